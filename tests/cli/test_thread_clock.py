"""The clock of the CPU sort, on a timer that a test moves."""

from adaptive_moe.cli.thread_clock import PASSES, ThreadClock


def test_a_sample_is_the_shortest_of_its_calls_after_the_neutral_one():
    now, done = [0.0], []

    def call(name, seconds):
        def run():
            done.append(name)
            now[0] += seconds

        return run

    clock = ThreadClock(call("neutral", 9.0), lambda: now[0])
    train = [call("usual", 2e-6), call("slowed", 3e-6), call("stalled", 5.0)]
    sample = clock.prepare(train)()()
    assert round(sample.device_us, 6) == 2.0
    assert sample.host_us is None
    assert done == ["neutral", *["usual", "slowed", "stalled"] * PASSES]
