"""The benchmark's contenders of Hugging Face and PEFT."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from benchmark.contenders import PEFT, MixedPEFT, hugging_face_logits  # noqa: E402
from benchmark.shapes import Setting, codes, ranks  # noqa: E402

TINY = Setting(layers=2, dim=16, ffn=32, heads=2, words=40, sentences=9, tokens=6)
LANGUAGES = 4


def test_a_mixed_batch_of_peft_is_each_sentence_with_its_own_adapter():
    mixed, batch = MixedPEFT(TINY, LANGUAGES), TINY.batch(LANGUAGES)
    mixed.add_noise()
    assert [mixed.model.peft_config[code].r for code in codes(LANGUAGES)] == ranks(LANGUAGES)
    with torch.no_grad():
        whole = mixed.logits(batch)
        for language in range(LANGUAGES):
            mixed.model.set_adapter(codes(LANGUAGES)[language])
            own = hugging_face_logits(mixed.model, batch)
            chosen = batch.lang_ids["target_lang_ids"] == language
            assert chosen.any() and not chosen.all()
            torch.testing.assert_close(whole[chosen], own[chosen], atol=1e-5, rtol=1e-5)
            assert (whole[~chosen] - own[~chosen]).abs().amax((1, 2)).min() > 1e-4


def test_a_mixed_batch_of_peft_trains_the_adapters_of_its_languages():
    mixed, batch = MixedPEFT(TINY, LANGUAGES), TINY.batch(LANGUAGES)
    mixed.start_optimizer()
    mixed.forward_backward(batch)
    trained = {name: p.grad for name, p in mixed.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for code in codes(LANGUAGES):
        grads = [g for name, g in trained.items() if f"lora_B.{code}." in name]
        assert grads and all(g is not None and g.any() for g in grads)


@pytest.mark.parametrize("contender", [PEFT, MixedPEFT])
def test_over_a_base_in_half_precision_adapters_stay_in_fp32(contender):
    model = contender(replace(TINY, precision="bf16"), LANGUAGES).model
    found = {is_trained: set() for is_trained in (True, False)}
    for param in model.parameters():
        found[param.requires_grad].add(param.dtype)
    assert found == {True: {torch.float}, False: {torch.bfloat16}}
