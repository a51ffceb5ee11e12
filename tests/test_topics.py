from data.topics import BEHAVIOURS, TOPICS, lesson_demonstrations, lesson_problems, lessons
from mtpo.chat import ChatFormat
from mtpo.dialogue import CLOSING
from mtpo.students import mentions
from tests.tiny_tokenizers import make_tokenizer


def test_no_question_names_what_it_asks_for_and_no_two_concepts_of_a_topic_share_a_question() -> None:
    for topic in TOPICS:
        assert len(set(topic.questions.values())) == len(topic.questions)
        for concept, question in topic.questions.items():
            assert not mentions(question, concept)


def test_problems_do_not_tell_the_teacher_what_there_is_to_understand() -> None:
    for problem in lesson_problems():
        concepts = lessons()[problem.id].questions
        assert problem.answer == ", ".join(concepts)
        assert not any(mentions(problem.question, concept) for concept in concepts)


def test_demonstrations_are_talks_that_any_format_can_render() -> None:
    chat = ChatFormat.for_tokenizer(make_tokenizer("gemma"))
    for problem_id, messages in lesson_demonstrations(len(TOPICS)):
        segments = chat.import_messages(messages)
        assert [s.kind for s in segments[1::2]] == ["action"] * (len(segments) // 2)
        assert segments[0].text == f"Can you teach me about {lessons()[problem_id].name}?"
    assert list(lesson_demonstrations(2, seed=1)) == list(lesson_demonstrations(2, seed=1))
    assert list(lesson_demonstrations(2, seed=1)) != list(lesson_demonstrations(2, seed=2))


def test_the_scripted_teacher_says_goodbye_as_often_as_it_should() -> None:
    turns = closed = 0
    for _, messages in lesson_demonstrations(600):
        later = [m["content"] for m in messages[3::2] if m["role"] == "assistant"]
        turns += len(later)
        closed += sum(CLOSING in text for text in later)
    assert abs(closed / turns - BEHAVIOURS["goodbye"]) < 0.03  # four standard errors of 2,200 turns
