"""The fuzz of adapter files, a short one."""

import fuzz_adapters


def test_nothing_is_accepted_with_other_values(tmp_path):
    found = fuzz_adapters.fuzz(400, seed=2)
    whats = {what for _, what in found}
    assert whats <= {fuzz_adapters.REFUSED, fuzz_adapters.REWRITTEN, fuzz_adapters.AS_WRITTEN}
    assert {fuzz_adapters.REFUSED, fuzz_adapters.REWRITTEN} <= whats
    assert sum(found.values()) == 400
