"""The fuzz of adapter files, a short one."""

import fuzz_adapters
import pytest


def test_nothing_is_accepted_with_other_values(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz_adapters.py", "--files", "400", "--seed", "2"])
    assert fuzz_adapters.main() == 0
    *_, told = capsys.readouterr().out.split("\n\n")
    counts = {line.split(None, 1)[1]: int(line.split()[0]) for line in told.strip().splitlines()}
    assert sum(counts.values()) == 400 and counts[fuzz_adapters.BAD] == 0
    assert counts[fuzz_adapters.REFUSED] > 300 and counts[fuzz_adapters.REWRITTEN] > 5


@pytest.mark.parametrize("check", ["_check_sum", "_check_values"])
def test_a_reader_that_does_not_check_is_found(monkeypatch, check):
    monkeypatch.setattr(fuzz_adapters.files, check, lambda *_: None)
    found = fuzz_adapters.fuzz(400, seed=2)
    whats = {what for _, what in found}
    if check == "_check_sum":
        assert fuzz_adapters.BAD in whats
    else:  # values that are no numbers pass, as a valid file would
        numbers = found["numbers", fuzz_adapters.REWRITTEN]
        assert numbers > found["numbers", fuzz_adapters.REFUSED]
