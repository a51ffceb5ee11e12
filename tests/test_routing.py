from contextlib import ExitStack

from mtpo.engines.routing import SLACK, Router


def test_new_sessions_go_to_the_least_loaded_server() -> None:
    router = Router(3)
    with ExitStack() as running:
        found = [running.enter_context(router.route(f"session {i}", range(3))) for i in range(7)]
    assert found == [0, 1, 2, 0, 1, 2, 0]
    assert router.in_flight == [0, 0, 0]


def test_a_session_stays_until_it_is_released() -> None:
    router = Router(2)
    with router.route("a", range(2)) as home, router.route("b", range(2)):
        assert home == 0
    with ExitStack() as running:
        for _ in range(3):
            running.enter_context(router.route("", {home}))
        assert running.enter_context(router.route("a", range(2))) == home
        router.release("a")
        assert running.enter_context(router.route("a", range(2))) == 1


def test_a_session_leaves_a_server_with_far_more_to_do_and_does_not_come_back() -> None:
    router = Router(2)
    with router.route("a", range(2)) as home:
        assert home == 0
    with ExitStack() as running:
        for _ in range(SLACK):
            running.enter_context(router.route("", {0}))
        with router.route("a", range(2)) as server:
            assert server == 0
        running.enter_context(router.route("", {0}))
        with router.route("a", range(2)) as server:
            assert server == 1
    with router.route("a", range(2)) as server:
        assert server == 1


def test_a_session_moves_when_its_server_is_gone() -> None:
    router = Router(3)
    with router.route("a", range(3)):
        pass
    with router.route("a", {1, 2}) as server:
        assert server == 1
