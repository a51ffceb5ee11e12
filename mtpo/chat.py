"""The turns of a model family as token ids, measured from the tokenizer's own chat template.

One mechanism serves every family: render the conversation so far with the generation prompt, before and
after a turn; what was added is the turn. Nothing that the model wrote is ever rendered again. A template
for which the longer rendering does not begin with the shorter one, followed by what the model wrote, cannot
be used turn by turn and is refused. One kind of change is answered instead: templates of reasoning models drop
earlier thoughts, or open a thought in the generation prompt alone. Here thoughts stay where they were sampled.

The protocol on top: a turn with a ```python block asks for its (last) block to be run, a `\\boxed{}` in its
prose is the answer; neither counts inside a thought. Tool output is a user turn with an ```output fence, as in
arXiv 2409.02392, except for families whose template has a tool turn that keeps earlier turns unchanged.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from mtpo.answers import boxed_in_prose
from mtpo.errors import InputError, TemplateError
from mtpo.trajectory import Execution, Problem, Segment, StopReason, Trajectory

logger = logging.getLogger(__name__)

Message = Mapping[str, str]

DATE = "26 Jul 2024"
"""Today, as Llama 3.1 has it by default; for Llama 3.2 and 3.3, whose prompts would else be others every day."""

_CODE_BLOCK = re.compile(r"```[ \t]*(?:python|py)[ \t]*\n(.*?)(?:\n?[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)
_OUTPUT_BLOCK = re.compile(
    r"```[ \t]*output[ \t]*\n(.*?)(?:\n?```[ \t]*(?:\n|\Z)|\Z)", re.DOTALL | re.IGNORECASE
)
_FENCED_OUTPUT = re.compile(r"\A\s*```output\n(.*?)\n?```\s*\Z", re.DOTALL)
_THOUGHT_TAGS = re.compile(r"\s*(?:</?think>\s*)+")
_OUTPUTS = ("7 apples", "", " two\n\n lines\n", "<&'\"\\>{{ x }}{% y", "</think>\n```\né<|a|>")
"""Tool outputs that show whether a template changes what it is given."""
_ACTION = "action of the model"
"""Stands for what the model writes where its place in a template is looked for."""
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ERROR_LINE = re.compile(r"^(?:[A-Za-z_][\w.]*)?(?:Error|Exception|Interrupt|Timeout)\b", re.MULTILINE)


def code_to_run(text: str) -> str | None:
    """The last ```python block of a turn, also one whose fence was never closed; None without a block."""
    blocks = _CODE_BLOCK.findall(without_thoughts(text))
    return blocks[-1].rstrip() if blocks and blocks[-1].strip() else None


def answer_of(text: str) -> str | None:
    """The boxed answer in the prose of a turn; None without one."""
    return boxed_in_prose(without_thoughts(text))


def without_thoughts(text: str) -> str:
    """What a turn says after its <think> block; nothing if that was never closed."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


@dataclass(frozen=True)
class _Family:
    name: str
    marker: str
    """Occurs in the family's chat template and in no other's."""
    tool_role: Literal["user", "tool"] = "user"
    text_markers: tuple[str, ...] = ()
    """What begins and ends turns, where that is no token of its own in some versions."""


_FAMILIES = (
    _Family("gemma", "<start_of_turn>"),
    _Family("llama3", "<|start_header_id|>"),
    _Family("mistral", "[INST]", text_markers=("[INST]", "[/INST]")),
    _Family("qwen", "<|im_start|>", tool_role="tool"),
)


@dataclass(frozen=True)
class ChatFormat:
    """How one tokenizer writes prompts and tool output around what the model samples.

    Made by `for_tokenizer`. All ids are those of the published template, rendered once as a whole, wherever
    the template's own tokenisation has a border at the end of a turn.
    """

    tokenizer: Any = field(repr=False)
    family: str
    tool_role: Literal["user", "tool"]
    """Role under which tool output is rendered; `user` puts it into an ```output fence."""
    end_of_turn: str
    end_of_turn_id: int
    """The id that the model samples to end a turn: part of the action, and trained."""
    stop_ids: tuple[int, ...]
    """End of turn and end of sequence: generation stops after either."""
    bos_id: int | None
    """The id that every prompt starts with, where the family has one."""
    lead: str = ""
    """White space that the template puts between the generation prompt and what the model writes."""
    has_system_turn: bool = False
    """Whether the template takes a system text and leaves it in its place when the conversation goes on."""
    keeps_thoughts: bool = True
    """Whether the template renders earlier thoughts as they were written; if not, it is asked for the prompt and for
    what stands between turns, and never again for a turn of the model."""
    around_output: tuple[str, str] | None = None
    """What the template puts before and after tool output, ends of turns included; None if it changes outputs, so that
    each has to be rendered."""
    markers: tuple[str, ...] = field(default=(), repr=False)
    """Control tokens, and text that the template ends turns with; none is ever made of a message's text."""

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, *, tool_role: Literal["user", "tool"] | None = None) -> Self:
        """Measure the tokenizer's chat template.

        Args:
            tokenizer: a `transformers` tokenizer with a chat template.
            tool_role: how tool output is rendered; by default as the family does best: the template's tool turn
                for Qwen, a user turn elsewhere.

        Raises:
            TemplateError: there is no template, it refuses or leaves out tool output, it changes earlier turns
                otherwise than in their thoughts (the message names the first such turn), or no single token ends
                a model turn.
        """
        template = _template_of(tokenizer)
        family = next((f for f in _FAMILIES if f.marker in template), _Family("measured", ""))
        draft = cls(
            tokenizer,
            family.name,
            tool_role or family.tool_role,
            "",
            -1,
            (),
            None,
            markers=(*_special_tokens(tokenizer), *family.text_markers),
        )
        end_of_turn, lead = draft._measure_turns()
        end_of_turn_id = _single_id(tokenizer, end_of_turn)
        stop_ids = dict.fromkeys(i for i in (end_of_turn_id, tokenizer.eos_token_id) if i is not None)
        chat = replace(
            draft,
            end_of_turn=end_of_turn,
            end_of_turn_id=end_of_turn_id,
            stop_ids=tuple(stop_ids),
            bos_id=draft._measure_bos(),
            lead=lead,
            has_system_turn=draft._measure_system_turn(),
        )
        chat = replace(chat, around_output=chat._measure_around_output())
        if not chat._measure_thoughts():
            logger.warning(
                "the chat template of %s rewrites the thoughts of earlier turns; here they stay as sampled",
                _name(tokenizer),
            )
            return replace(chat, keeps_thoughts=False)
        return chat

    def prompt(self, question: str, *, system: str | None = None) -> Segment:
        """The user's question and the generation prompt; its first id is the BOS where the family has one.

        A system text is rendered by the template where the family has a place for it. Gemma 1 and 2 have none,
        and Mistral v0.3 moves it to the newest user turn: there it stands in front of the question, a blank line
        between, as Gemma 3 has it. Control tokens spelled out inside the text are broken up, so that text cannot
        pose as a turn.
        """
        history = self._opening_messages(question, system)
        return self._prompt_segment(history, self._render(history))

    def observation(
        self, output: str, *, after: Sequence[int], role: Literal["tool", "user"] = "tool"
    ) -> Segment:
        """What the model reads after a turn, and the generation prompt: every id between an action and the next one.

        Control tokens spelled out inside the text are broken up, so that text cannot pose as a turn.

        Args:
            output: what the interpreter returned, without a fence; or what somebody said.
            role: `user` is somebody who talks to the model: a user turn, without a fence.
            after: ids of the action before. If it does not end with the end-of-turn id, that id comes first here:
                the context then reads as the template has it, and the id is not trained.
        """
        output = self._plain(output)
        if role == "user":
            text = self._text_after_turn(_user(output))
        elif self.around_output:
            text = output.join(self.around_output)
        else:
            text = self._text_of_output(output)
        ids = self._ids_after_turn(text)
        if not after or after[-1] != self.end_of_turn_id:
            ids = [self.end_of_turn_id, *ids]
        return Segment("observation", tuple(ids), None, output)

    def action_text(self, ids: Sequence[int]) -> str:
        """What the model wrote in one turn, without the id that ended it."""
        content = list(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            return backend.decode(content, skip_special_tokens=False)  # the same text, less ceremony
        return self.tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def tool_message(self, output: str) -> Message:
        """Tool output as the template is given it: under the role, and in the fence, of the family."""
        if self.tool_role == "tool":
            return {"role": "tool", "content": output}
        return _user(f"```output\n{output}\n```")

    def import_messages(self, messages: Sequence[Message]) -> tuple[Segment, ...]:
        """Render a finished conversation of others turn by turn, every assistant turn ended by the end-of-turn id.

        Args:
            messages: roles `system` (first only), `user`, `assistant` and `tool`. After the first assistant
                message, a user message is an observation too; its ```output fence, if it has one, is taken off.
                Tool output after the last assistant message answers nothing and is left out.

        Raises:
            InputError: roles do not alternate, nobody answers, or a turn lacks the thought that the generation
                prompt has begun.
            TemplateError: the template changes an earlier turn of this conversation, and not for thoughts that
                it never keeps; names the turn.
        """
        system, turns = _alternating(messages)
        history = self._opening_messages(turns[0]["content"], system)
        before = self._render(history)
        segments = [self._prompt_segment(history, before)]
        for index in range(1, len(turns), 2):
            content = self._plain(turns[index]["content"].strip())
            if before.rstrip().endswith("<think>"):
                content = self._continue_thought(content, turn=index // 2 + 1)
            action = self.lead + content
            ids = (*self._ids_after_text(before, action), self.end_of_turn_id)
            segments.append(Segment("action", ids, None, content))
            if index + 1 == len(turns):
                break
            output = self._plain(turns[index + 1]["content"])
            observed = self._as_rendered({"role": turns[index + 1]["role"], "content": output})
            history += [_assistant(content), observed]
            seen = before + action + self.end_of_turn
            before = self._render(history) if self.keeps_thoughts else seen + self._text_after_turn(observed)
            if not before.startswith(seen):
                raise TemplateError(self._unstable(index // 2 + 1))
            ids = self._ids_after_turn(before[len(seen) :])
            segments.append(Segment("observation", tuple(ids), None, output))
        return tuple(segments)

    def import_trajectory(
        self,
        problem: Problem,
        messages: Sequence[Message],
        *,
        sample: int = 0,
        policy: str = "imported",
        metadata: Mapping[str, Any] | None = None,
    ) -> Trajectory:
        """A trajectory from a finished conversation of others; see `import_messages` for what raises."""
        segments = self.import_messages(messages)
        last = segments[-1].text
        if answer_of(last) is not None:
            stop_reason = StopReason.ANSWERED
        else:
            stop_reason = StopReason.TURN_LIMIT if code_to_run(last) else StopReason.NO_CODE
        return Trajectory(
            problem_id=problem.id,
            sample=sample,
            segments=segments,
            stop_reason=stop_reason,
            executions=_executions(segments),
            bos_id=self.bos_id,
            policy=policy,
            metadata=metadata or {},
        )

    # -- rendering ---------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message]) -> str:
        """The conversation so far and the generation prompt, as text."""
        try:
            return self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tokenize=False,
                add_generation_prompt=True,
                date_string=DATE,
            )
        except Exception as error:  # a template may raise anything: it is a program of its own
            roles = [m["role"] for m in messages]
            reason = " ".join(str(error).split())
            raise TemplateError(
                f"the chat template of {_name(self.tokenizer)} cannot render the roles {roles}: {reason}"
            ) from error

    def _opening_messages(self, question: str, system: str | None) -> list[Message]:
        question = self._plain(question)
        if not system:
            return [_user(question)]
        if self.has_system_turn:
            return [{"role": "system", "content": self._plain(system)}, _user(question)]
        return [_user(f"{self._plain(system)}\n\n{question}")]

    def _prompt_segment(self, history: Sequence[Message], rendered: str) -> Segment:
        text = "\n\n".join(message["content"] for message in history)
        return Segment("prompt", tuple(self._prompt_ids(rendered)), None, text)

    def _text_after_turn(self, observed: Message) -> str:
        """What the template puts between the end of a model turn and the next one, to show what it observed."""
        text = self._render([_user("q"), _assistant(_ACTION), observed])
        return text[text.index(_ACTION) + len(_ACTION + self.end_of_turn) :]

    def _text_of_output(self, output: str) -> str:
        return self._text_after_turn(self._as_rendered({"role": "tool", "content": output}))

    def _continue_thought(self, content: str, turn: int) -> str:
        """The content without the tag that the generation prompt has already written."""
        if "</think>" not in content:
            raise InputError(
                f"assistant turn {turn} has no thought, but the generation prompt of {_name(self.tokenizer)} opens one"
            )
        return content.removeprefix("<think>").lstrip("\n")

    def _as_rendered(self, message: Message) -> Message:
        content = message["content"]
        return self.tool_message(content) if message["role"] == "tool" else _user(content)

    def _plain(self, text: str) -> str:
        """The text with control tokens broken up by a space, so that they are tokenised as text."""
        for token in self.markers:
            if token in text:
                text = text.replace(token, token[0] + " " + token[1:])
        return text

    # -- tokenising --------------------------------------------------------------------------------------

    def _tokenize(self, text: str) -> list[int]:
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            return backend.encode(text, add_special_tokens=False).ids  # the same ids, less ceremony
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self._tokenize(text)
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _ids_after_turn(self, text: str) -> list[int]:
        """Ids of text that stands right after an end-of-turn token, as tokenised in that place."""
        ids = self._tokenize(self.end_of_turn + text)
        if ids[0] != self.end_of_turn_id:
            raise TemplateError(f"{_name(self.tokenizer)} does not keep {self.end_of_turn!r} as one token")
        return ids[1:]

    def _ids_after_text(self, before: str, text: str) -> list[int]:
        """Ids of text that stands after `before`: as tokenised in that place if a token border falls there."""
        last_line = before[before.rfind("\n", 0, -1) + 1 :]
        anchor, joint = self._tokenize(last_line), self._tokenize(last_line + text)
        return joint[len(anchor) :] if joint[: len(anchor)] == anchor else self._ids_after_turn(text)

    # -- measuring ---------------------------------------------------------------------------------------

    def _measure_turns(self) -> tuple[str, str]:
        """(end-of-turn token, white space before an action), from a conversation of three tool calls."""
        history: list[Message] = [_user("first question")]
        seen, found = self._render(history), None
        for turn in (1, 2, 3):
            action, output = f"action {turn} of the model", f"output {turn} of the tool"
            history += [_assistant(action), self._as_rendered({"role": "tool", "content": output})]
            longer = self._render(history)
            start = max(longer.find(action), 0)
            kept = os.path.commonprefix([seen, longer[:start]])  # noqa: RUF071 - of characters
            dropped, lead = seen[len(kept) :], longer[len(kept) : start]
            if dropped or lead.strip():
                if not _THOUGHT_TAGS.fullmatch(dropped + lead):
                    raise TemplateError(self._unstable(turn))
                lead = ""  # an empty thought, which the model need not write
            end_of_turn = self._special_token_at(longer[start + len(action) :])
            delta = longer[start + len(action) :]
            if output not in delta:
                raise TemplateError(
                    f"the chat template of {_name(self.tokenizer)} leaves out tool output as a {self.tool_role} turn"
                )
            measured = end_of_turn, lead, delta.replace(output, "output")
            if found is None:
                found = measured
            elif found != measured:
                raise TemplateError(self._unstable(turn))
            seen = longer
        assert found is not None
        return found[0], found[1]

    def _measure_thoughts(self) -> bool:
        """Whether a thought is rendered as it was written when the conversation goes on."""
        content, question = f"<think>\nidea\n</think>\n\n{_ACTION}", _user("first question")
        seen = self._render([question]) + self.lead + content + self.end_of_turn
        output = self._as_rendered({"role": "tool", "content": "output"})
        return self._render([question, _assistant(content), output]).startswith(seen)

    def _measure_system_turn(self) -> bool:
        """Whether a system text is rendered, and stays where it is when the conversation goes on."""
        opening = [{"role": "system", "content": "system text"}, _user("first question")]
        output = self._as_rendered({"role": "tool", "content": "output"})
        try:
            text = self._render(opening)
            longer = self._render([*opening, _assistant(_ACTION), output])
        except TemplateError:
            return False
        beginning = text[: text.index("first question")]
        return "system text" in beginning and longer.startswith(beginning)

    def _special_token_at(self, text: str) -> str:
        for token in sorted(self.markers, key=len, reverse=True):
            if text.startswith(token):
                return token
        raise TemplateError(
            f"the chat template of {_name(self.tokenizer)} ends a model turn with {text[:20]!r}, "
            "which is not a special token: generation could not stop on ids"
        )

    def _measure_around_output(self) -> tuple[str, str] | None:
        before, _, after = self._text_of_output(_OUTPUTS[0]).partition(_OUTPUTS[0])
        is_verbatim = all(self._text_of_output(output) == before + output + after for output in _OUTPUTS)
        return (before, after) if is_verbatim else None

    def _measure_bos(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return None
        text = self._render([_user("q")])
        has_one = self._tokenize(text)[:1] == [bos] or self.tokenizer(text)["input_ids"][:1] == [bos]
        return bos if has_one else None

    def _unstable(self, turn: int) -> str:
        return (
            f"the chat template of {_name(self.tokenizer)} is not prefix-stable at turn {turn}: rendering the "
            f"conversation with tool output as a {self.tool_role} turn changes what came before it"
        )


def messages_from_flat_text(question: str, text: str) -> list[dict[str, str]]:
    """Messages of a ToRA/MathCoder-style solution: prose and ```python blocks, results in ```output fences."""
    messages = [{"role": "user", "content": question}]
    position = 0
    for block in _OUTPUT_BLOCK.finditer(text):
        messages.append({"role": "assistant", "content": text[position : block.start()].strip()})
        messages.append({"role": "tool", "content": block.group(1)})
        position = block.end()
    if rest := text[position:].strip():
        messages.append({"role": "assistant", "content": rest})
    return messages


def _alternating(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """The system text, and the turns, checked to be user, assistant, observation, assistant, ..."""
    turns: list[Message] = [dict(m) for m in messages]
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    for index, message in enumerate(turns):
        role, expected = (
            message["role"],
            "assistant" if index % 2 else ("user" if index == 0 else "tool or user"),
        )
        if role not in expected.split(" or "):
            raise InputError(f"message {index} has the role {role!r}, expected {expected}")
        if index and role == "user" and (fenced := _FENCED_OUTPUT.match(message["content"])):
            turns[index] = {"role": "tool", "content": fenced.group(1)}
    if turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2:
        raise InputError("a conversation needs a user message and an assistant message")
    return system, turns


def _executions(segments: Sequence[Segment]) -> tuple[Execution, ...]:
    """What the tool turns of an imported conversation tell of their executions; seconds are unknown and 0."""
    found = []
    for action, observation in zip(segments[1::2], segments[2::2], strict=False):
        code = code_to_run(action.text)
        if code is not None:
            is_error = _ERROR_LINE.search(_ANSI.sub("", observation.text)) is not None
            found.append(Execution(code, observation.text, "error" if is_error else "ok", 0.0))
    return tuple(found)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _template_of(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise TemplateError(
            f"{_name(tokenizer)} has no chat template: use the instruction-tuned model's tokenizer, or set one"
        )
    return template


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _single_id(tokenizer: Any, token: str) -> int:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise TemplateError(f"{_name(tokenizer)} splits its end-of-turn token {token!r} into {len(ids)} ids")
    return ids[0]


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
