from sglang_hma.launch.restarts import RestartPolicy, Restarts


def test_back_off_grows_to_its_limit_and_a_window_forgets() -> None:
    now = 0.0
    policy = RestartPolicy(limit=6, window_s=100, first_s=1, longest_s=10)
    restarts = Restarts(policy, clock=lambda: now)
    assert not restarts.any
    assert [restarts.died() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    assert restarts.died() is None
    assert str(restarts) == "restart 6 of 6 in 100 s"
    now = 99.0
    assert restarts.died() is None
    now = 100.0
    assert restarts.died() == 1


def test_none_are_allowed() -> None:
    restarts = Restarts(RestartPolicy(limit=0))
    assert restarts.died() is None and not restarts.any
