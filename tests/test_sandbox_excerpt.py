"""Excerpts equal what cutting the whole text at once would give."""

from hypothesis import given
from hypothesis import strategies as st

from sandbox.excerpt import MARKER_ROOM, Excerpt


def cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head, tail = text[: limit - limit // 2], text[len(text) - limit // 2 + MARKER_ROOM :]
    return f"{head}\n[... {len(text) - len(head) - len(tail)} characters cut ...]\n{tail}"


pieces = st.lists(st.text("abc\n", max_size=300), max_size=12)


@given(pieces, st.integers(200, 400))
def test_pieces_read_as_the_whole(pieces: list[str], limit: int) -> None:
    excerpt = Excerpt(limit)
    for piece in pieces:
        excerpt.add(piece)
    assert excerpt.text() == cut("".join(pieces), limit)
    assert len(excerpt.text()) <= limit


@given(pieces, st.integers(200, 400))
def test_head_and_tail_sent_on_read_as_the_whole(pieces: list[str], limit: int) -> None:
    kernel, pool = Excerpt(limit), Excerpt(limit)
    for piece in pieces:
        pool.add(kernel.add(piece))
    num_cut, tail = kernel.take_tail()
    pool.skip(num_cut)
    pool.add(tail)
    assert pool.text() == cut("".join(pieces), limit)


def test_memory_does_not_grow_with_the_text() -> None:
    excerpt = Excerpt(1000)
    for _ in range(1000):
        excerpt.add("x" * 10_000)
        assert len(excerpt._tail) <= 1000
    assert excerpt.text().startswith("x" * 500 + "\n[... 9999040 characters cut")
