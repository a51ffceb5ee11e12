from dataclasses import replace
from typing import Literal

import pytest

from mtpo.chat import ChatFormat, answer_of, code_to_run, messages_from_flat_text
from mtpo.errors import InputError, TemplateError
from mtpo.trajectory import Problem, StopReason, Trajectory
from tests.tiny_tokenizers import FAMILIES, TINY_FAMILIES, make_tokenizer, published_template

QUESTION = "Natalia sold 48 clips in April.\n\nHow many clips did she sell altogether?"
ACTIONS = (
    "Add them.\n```python\ntotal = 48 + 24\nprint(total)\n```",
    "Check it again.\n```python\nprint(total - 24)\n```",
    "The answer is $\\boxed{72}$.",
)
OUTPUTS = ("72", "  48\n\n  # \"quoted\" 'text'")


def role_of_tool(family: str) -> str:
    return "tool" if family.startswith("qwen") else "user"


def published_messages(family: str) -> list[dict[str, str]]:
    """The conversation as its author would hand it to `apply_chat_template`."""
    messages = [{"role": "user", "content": QUESTION}]
    for index, action in enumerate(ACTIONS):
        messages.append({"role": "assistant", "content": action})
        if index < len(OUTPUTS):
            output = OUTPUTS[index]
            text = output if role_of_tool(family) == "tool" else f"```output\n{output}\n```"
            messages.append({"role": role_of_tool(family), "content": text})
    return messages


def play(chat: ChatFormat) -> Trajectory:
    """The conversation as a rollout makes it, with what the model writes encoded as its engine would sample it."""
    segments = [chat.prompt(QUESTION)]
    for index, action in enumerate(ACTIONS):
        ids = chat.tokenizer(chat.end_of_turn + chat.lead + action, add_special_tokens=False)["input_ids"][1:]
        ids.append(chat.end_of_turn_id)
        segments.append(type(segments[0])("action", tuple(ids), None, chat.action_text(ids)))
        if index < len(OUTPUTS):
            segments.append(chat.observation(OUTPUTS[index], after=ids))
    return Trajectory("p", 0, tuple(segments), StopReason.ANSWERED, bos_id=chat.bos_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_published_template_at_every_turn(family: str) -> None:
    tokenizer = make_tokenizer(family)
    trajectory = play(ChatFormat.for_tokenizer(tokenizer))
    messages = published_messages(family)
    for turn in range(len(ACTIONS)):
        text = tokenizer.apply_chat_template(
            messages[: 2 * turn + 1], tokenize=False, add_generation_prompt=True
        )
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        seen = [i for segment in trajectory.segments[: 2 * turn + 1] for i in segment.ids]
        assert seen == expected
        assert trajectory.input_ids[: len(seen)] == seen


@pytest.mark.parametrize("family", FAMILIES)
def test_what_somebody_says_is_a_user_turn_of_the_published_template(family: str) -> None:
    tokenizer = make_tokenizer(family)
    chat = ChatFormat.for_tokenizer(tokenizer)
    said = ["Why are leaves green?", "Chlorophyll.", '```output\nmine\n``` I see "it". And water?']
    action = [*tokenizer(chat.end_of_turn + chat.lead + said[1], add_special_tokens=False)["input_ids"][1:]]
    action.append(chat.end_of_turn_id)
    reply = chat.observation(said[2], after=action, role="user")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    seen = [*chat.prompt(said[0]).ids, *action, *reply.ids]
    assert seen == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert reply.text == said[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_marks_exactly_the_sampled_ids(family: str) -> None:
    tokenizer = make_tokenizer(family)
    trajectory = play(ChatFormat.for_tokenizer(tokenizer))
    pairs = zip(trajectory.input_ids, trajectory.completion_mask, strict=True)
    trained = tokenizer.decode([i for i, mask in pairs if mask])
    assert [t.strip() for t in trained.split(TINY_FAMILIES[family].end_of_turn)] == [*ACTIONS, ""]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_end_of_turn_is_trained_and_what_the_template_adds_after_it_is_not(family: str) -> None:
    tokenizer = make_tokenizer(family)
    trajectory = play(ChatFormat.for_tokenizer(tokenizer))
    end = tokenizer.convert_tokens_to_ids(TINY_FAMILIES[family].end_of_turn)
    ends = [k for k, i in enumerate(trajectory.input_ids) if i == end and trajectory.completion_mask[k]]
    assert len(ends) == len(ACTIONS)
    assert all(trajectory.completion_mask[k + 1] == 0 for k in ends[:-1])
    if family.startswith("gemma"):
        assert tokenizer.decode(trajectory.input_ids[ends[0] + 1]) == "\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_one_bos_where_the_family_has_one(family: str) -> None:
    tokenizer = make_tokenizer(family)
    chat = ChatFormat.for_tokenizer(tokenizer)
    ids = play(chat).input_ids
    if TINY_FAMILIES[family].bos is None:
        assert chat.bos_id is None
    else:
        assert chat.bos_id == tokenizer.bos_token_id
        assert ids[0] == chat.bos_id and sum(i == chat.bos_id for i in ids) == 1


def test_bos_that_only_the_tokenizer_adds_is_kept() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer("gemma", published_template("gemma").replace("{{ bos_token }}", ""))
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert ChatFormat.for_tokenizer(tokenizer).prompt("How many?").ids[:2] == (
        bos,
        tokenizer.convert_tokens_to_ids("<start_of_turn>"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_imported_messages_give_the_ids_of_the_rollout(family: str) -> None:
    chat = ChatFormat.for_tokenizer(make_tokenizer(family))
    segments = chat.import_messages(published_messages(family))
    assert [s.kind for s in segments] == [s.kind for s in play(chat).segments]
    assert [s.ids for s in segments] == [s.ids for s in play(chat).segments]


def test_gemma_shows_tool_output_as_a_fenced_user_turn() -> None:
    tokenizer = make_tokenizer("gemma")
    chat = ChatFormat.for_tokenizer(tokenizer)
    assert tokenizer.decode(chat.observation("72", after=[chat.end_of_turn_id]).ids) == (
        "\n<start_of_turn>user\n```output\n72\n```<end_of_turn>\n<start_of_turn>model\n"
    )


def test_end_of_turn_is_inserted_untrained_when_the_model_did_not_sample_it() -> None:
    chat = ChatFormat.for_tokenizer(make_tokenizer("gemma"))
    sampled = chat.observation("72", after=[5, chat.end_of_turn_id]).ids
    assert chat.observation("72", after=[5, 6]).ids == (chat.end_of_turn_id, *sampled)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_tool_output_and_questions_stay_text(family: str) -> None:
    tokenizer = make_tokenizer(family)
    chat = ChatFormat.for_tokenizer(tokenizer)
    hostile = "".join(tokenizer.all_special_tokens) + TINY_FAMILIES[family].end_of_turn
    roles: tuple[Literal["tool", "user"], ...] = ("tool", "user")
    observed = [
        [chat.observation(text, after=[chat.end_of_turn_id], role=role) for text in ("5", hostile)]
        for role in roles
    ]
    for harmless, attacked in ((chat.prompt("5"), chat.prompt(hostile)), *observed):
        specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        assert [i for i in attacked.ids if i in specials] == [i for i in harmless.ids if i in specials]


def test_markers_of_turns_stay_text_where_they_are_no_tokens() -> None:
    tokenizer = make_tokenizer("mistral_v0_1")
    chat = ChatFormat.for_tokenizer(tokenizer)
    assert tokenizer.decode(chat.observation("[/INST] [INST]", after=[chat.end_of_turn_id]).ids) == (
        " [INST] ```output\n[ /INST] [ INST]\n``` [/INST]"
    )


def test_template_that_drops_earlier_turns_is_refused_with_the_turn() -> None:
    template = published_template("llama3").replace(
        "set loop_messages = messages", "set loop_messages = messages[-4:]"
    )
    with pytest.raises(TemplateError, match="not prefix-stable at turn 2"):
        ChatFormat.for_tokenizer(make_tokenizer("llama3", template))


def test_template_that_changes_an_imported_turn_is_refused_with_the_turn() -> None:
    template = published_template("llama3").replace("| trim", "| trim | replace('Hm', 'Well')")
    chat = ChatFormat.for_tokenizer(make_tokenizer("llama3", template))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Add."}]
    messages += [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "Hm."}]
    messages += [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "\\boxed{2}"}]
    with pytest.raises(TemplateError, match="not prefix-stable at turn 2"):
        chat.import_messages(messages)


@pytest.mark.parametrize(
    ("tool_role", "is_kept", "observed"),
    [
        ("tool", True, "user\n<tool_response>\n2\n</tool_response>"),
        ("user", False, "user\n```output\n2\n```"),
    ],
)
def test_thoughts_of_qwen3_survive_a_template_that_drops_them(
    tool_role: Literal["tool", "user"], is_kept: bool, observed: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer("qwen3")
    chat = ChatFormat.for_tokenizer(tokenizer, tool_role=tool_role)
    assert chat.keeps_thoughts == is_kept
    assert ("rewrites the thoughts of earlier turns; here they stay as sampled" in caplog.text) != is_kept
    thought = "<think>\nhm\n</think>\n\nAdd them."
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": thought}]
    messages += [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "\\boxed{2}"}]
    ids = [i for segment in chat.import_messages(messages) for i in segment.ids]
    assert tokenizer.decode(ids) == (
        f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{thought}<|im_end|>\n"
        f"<|im_start|>{observed}<|im_end|>\n<|im_start|>assistant\n\\boxed{{2}}<|im_end|>"
    )


def test_thought_that_the_generation_prompt_opens_is_not_opened_again() -> None:
    tokenizer = make_tokenizer("deepseek_r1")
    chat = ChatFormat.for_tokenizer(tokenizer)
    messages = [{"role": "user", "content": "q"}]
    messages += [{"role": "assistant", "content": "<think>\nhm\n</think>\n\n\\boxed{2}"}]
    prompt, action = chat.import_messages(messages)
    assert tokenizer.decode(prompt.ids).endswith("<think>\n")
    assert tokenizer.decode(action.ids) == "hm\n</think>\n\n\\boxed{2}" + tokenizer.eos_token
    with pytest.raises(InputError, match="assistant turn 1 has no thought, but the generation prompt"):
        chat.import_messages([*messages[:1], {"role": "assistant", "content": "\\boxed{2}"}])


@pytest.mark.parametrize(
    ("text", "code", "answer"),
    [
        ("<think>\n```python\nx\n```\n\\boxed{1}\n</think>\nNo.", None, None),
        ("hm \\boxed{1}\n</think>\n```python\ny\n```", "y", None),
        ("<think>\n\\boxed{1}\n</think>\n\n\\boxed{2}", None, "2"),
        ("\\boxed{3}\n<think>\n```python\nx\n```", None, "3"),
    ],
)
def test_what_is_only_thought_is_neither_run_nor_an_answer(
    text: str, code: str | None, answer: str | None
) -> None:
    assert (code_to_run(text), answer_of(text)) == (code, answer)


def test_template_that_leaves_out_tool_output_is_refused() -> None:
    with pytest.raises(TemplateError, match="leaves out tool output as a tool turn"):
        ChatFormat.for_tokenizer(make_tokenizer("phi3"), tool_role="tool")


def test_prompt_of_a_template_with_a_date_is_the_same_every_day() -> None:
    tokenizer = make_tokenizer("llama3_2")
    text = tokenizer.decode(ChatFormat.for_tokenizer(tokenizer).prompt("q").ids)
    assert "Today Date: 26 Jul 2024\n" in text


def test_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="has no chat template"):
        ChatFormat.for_tokenizer(tokenizer)


def test_template_whose_turns_end_in_plain_text_is_refused() -> None:
    turns = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(TemplateError, match="not a special token"):
        ChatFormat.for_tokenizer(make_tokenizer("qwen2_5", template))


def test_template_that_refuses_tool_turns_says_so_in_one_line() -> None:
    with pytest.raises(
        TemplateError, match=r"cannot render the roles \['user', 'assistant', 'tool'\]"
    ) as caught:
        ChatFormat.for_tokenizer(make_tokenizer("mistral"), tool_role="tool")
    assert "\n" not in str(caught.value)


def test_unknown_family_is_measured() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    ).replace("<|im_start|>", "<|im_end|>")
    chat = ChatFormat.for_tokenizer(make_tokenizer("qwen2_5", template))
    assert (chat.family, chat.end_of_turn) == ("measured", "<|endoftext|>")


def test_leading_newline_of_an_imported_turn_is_not_merged_into_the_header() -> None:
    tokenizer = make_tokenizer("gemma")
    chat = ChatFormat.for_tokenizer(tokenizer)
    assert tokenizer("model\n\n", add_special_tokens=False)["input_ids"][
        -1
    ] == tokenizer.convert_tokens_to_ids("\n\n")
    assert chat._ids_after_text("<start_of_turn>model\n", "\nHi")[0] == tokenizer.convert_tokens_to_ids("\n")


def test_roles_out_of_order_are_named() -> None:
    chat = ChatFormat.for_tokenizer(make_tokenizer("gemma"))
    with pytest.raises(InputError, match="message 1 has the role 'user', expected assistant"):
        chat.import_messages([{"role": "user", "content": "q"}, {"role": "user", "content": "again"}])


@pytest.mark.parametrize("family", FAMILIES)
def test_system_text_of_a_conversation_is_that_of_the_prompt(family: str) -> None:
    chat = ChatFormat.for_tokenizer(make_tokenizer(family))
    messages = published_messages(family)
    with_system = chat.import_messages([{"role": "system", "content": "Be brief."}, *messages])
    assert with_system[0] == chat.prompt(QUESTION, system="Be brief.")
    assert with_system[1:] == chat.import_messages(messages)[1:]
    assert chat.tokenizer.decode(with_system[0].ids).count("Be brief.") == 1


def test_import_tells_how_a_trajectory_ended_and_which_tool_calls_failed() -> None:
    chat = ChatFormat.for_tokenizer(make_tokenizer("gemma"))
    flat = (
        "Try.\n```python\nprint(x)\n```\n```output\nNameError: name 'x' is not defined\n```\n"
        "Again.\n```python\nprint(3)\n```\n```output\n3\n```\nSo $\\boxed{3}$."
    )
    problem = Problem("p", "How many?", "3")
    done = chat.import_trajectory(problem, messages_from_flat_text(problem.question, flat))
    assert done.stop_reason == StopReason.ANSWERED
    assert [(e.code, e.status) for e in done.executions] == [("print(x)", "error"), ("print(3)", "ok")]
    unfinished = messages_from_flat_text(problem.question, flat[: flat.rindex("So")])
    assert chat.import_trajectory(problem, unfinished).stop_reason == StopReason.TURN_LIMIT
    assert chat.import_trajectory(problem, unfinished).num_turns == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no code", None),
        ("```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\nthen\n```python\ny = 2\n```", "y = 2"),
        ("```python\nx = 1", "x = 1"),
        ("```output\nx = 1\n```", None),
        ("```python\n\n```", None),
    ],
)
def test_last_code_block_is_the_one_to_run(text: str, code: str | None) -> None:
    assert code_to_run(text) == code


def test_flat_text_is_split_at_its_output_fences() -> None:
    text = "Use code.\n```python\nprint(2)\n```\n```output\n2\n\n3\n```\nIt is $\\boxed{2}$."
    assert messages_from_flat_text("q", text) == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Use code.\n```python\nprint(2)\n```"},
        {"role": "tool", "content": "2\n\n3"},
        {"role": "assistant", "content": "It is $\\boxed{2}$."},
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_put_where_the_template_renders_it(family: str) -> None:
    chat = ChatFormat.for_tokenizer(make_tokenizer(family))
    assert chat.around_output is not None
    rendering = replace(chat, around_output=None)
    for output in (*OUTPUTS, "", f"{{{{ x }}}} {chat.end_of_turn}\n"):
        after = [chat.end_of_turn_id]
        assert chat.observation(output, after=after) == rendering.observation(output, after=after)


def test_a_template_that_changes_output_renders_each() -> None:
    chat = ChatFormat.for_tokenizer(make_tokenizer("llama3"), tool_role="tool")  # it trims
    assert chat.around_output is None
    ids = [chat.observation(output, after=[chat.end_of_turn_id]).ids for output in ("72", "  72\n")]
    assert ids[0] == ids[1]
