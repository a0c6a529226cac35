"""Folders of the forms that public models have on a hub, with small random weights."""

import json
import shutil

import sentencepiece
import torch
from safetensors.torch import save_file

CONFIG = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["M2M100ForConditionalGeneration"],
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "d_model": 16,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "decoder_layerdrop": 0.05,
    "decoder_layers": 1,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "encoder_layerdrop": 0.05,
    "encoder_layers": 2,
    "eos_token_id": 2,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "model_type": "m2m_100",
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "scale_embedding": True,
    "torch_dtype": "float32",
    "transformers_version": "4.21.0",
    "use_cache": True,
}
# some of NLLB's, in its order, which is not the alphabet's
NLLB = (
    "deu_Latn eng_Latn fao_Latn pes_Arab fij_Latn fra_Latn jpn_Jpan knc_Latn kaz_Cyrl plt_Latn "
    "zsm_Latn mya_Mymr sat_Beng spa_Latn als_Latn srd_Latn"
).split()
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


def write_json(folder, name, content):
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def spm(path, text, kind="bpe", size=300):
    """Trains a SentencePiece model on lines of text; returns its path."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(path.with_suffix("")), model_type=kind,
        vocab_size=size, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return path


def pieces(model):
    """Those of a SentencePiece model, without its own specials."""
    read = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [read.id_to_piece(number) for number in range(3, read.get_piece_size())]


def tensors(rows, seed=1, **config):
    """Name -> tensor, as such a model's file has them."""
    config = {**CONFIG, **config}
    generator, dim = torch.Generator().manual_seed(seed), config["d_model"]

    def draw(*shape):  # so that decoding does not repeat one word
        scale = 0.1 if len(shape) == 1 else 1.0
        return torch.randn(*shape, generator=generator) * scale

    found = {"model.shared.weight": draw(rows, dim) * 0.3}
    found["model.shared.weight"][1] = 0
    for stack, norms in _NORMS.items():
        inner = config[f"{stack}_ffn_dim"]
        names = [f"model.{stack}.layer_norm"]
        for layer in range(config[f"{stack}_layers"]):
            prefix = f"model.{stack}.layers.{layer}"
            attention = ["self_attn", "encoder_attn"][: 1 + (stack == "decoder")]
            sizes = {f"{a}.{p}_proj": (dim, dim) for a in attention for p in ("q", "k", "v", "out")}
            for name, size in {**sizes, "fc1": (inner, dim), "fc2": (dim, inner)}.items():
                found[f"{prefix}.{name}.weight"] = draw(*size)
                found[f"{prefix}.{name}.bias"] = draw(size[0])
            names += [f"{prefix}.{norm}" for norm in norms]
        for name in names:
            found[f"{name}.weight"], found[f"{name}.bias"] = 1 + draw(dim), draw(dim)
    return found


def m2m(folder, model, seed=1, **config):
    """A folder as facebook/m2m100_418M: vocab.json, in another order than the model's pieces, and
    languages that only their list numbers.

    Args:
        folder: a new folder
        model: path of a SentencePiece model
        seed: of the weights
        config: replaces fields of config.json

    Returns:
        codes of the languages
    """
    from lslora_fairseq.huggingface.vocabulary import M2M_100

    folder.mkdir(parents=True)
    shutil.copy(model, folder / "sentencepiece.bpe.model")
    words = [*SPECIALS, *reversed(pieces(model))]
    rows = len(words) + len(M2M_100) + 8
    write_json(folder, "vocab.json", {word: number for number, word in enumerate(words)})
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    specials |= {"sep_token": "</s>", "pad_token": "<pad>"}
    more = [f"__{code}__" for code in M2M_100]
    write_json(folder, "special_tokens_map.json", {**specials, "additional_special_tokens": more})
    settings = {"src_lang": None, "tgt_lang": None, "language_codes": "m2m100", **specials}
    settings |= {"tokenizer_class": "M2M100Tokenizer", "num_madeup_words": 8}
    write_json(folder, "tokenizer_config.json", settings)
    _finish(folder, rows, seed, config)
    return M2M_100


def nllb(folder, model, seed=1, langs=NLLB, **config):
    """A folder as facebook/nllb-200-*: pieces in the model's order, languages and ``<mask>`` with
    numbers in tokenizer.json, two rows without a token. As :func:`m2m`."""
    folder.mkdir(parents=True)
    shutil.copy(model, folder / "sentencepiece.bpe.model")
    words = [*SPECIALS, *pieces(model)]
    added = [*enumerate(SPECIALS), *enumerate([*langs, "<mask>"], len(words))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    told = [{"id": n, "content": token, **flags, "special": True} for n, token in added]
    vocab = {word: number for number, word in enumerate(words)}
    fast = {"version": "1.0", "added_tokens": told, "model": {"type": "BPE", "vocab": vocab}}
    write_json(folder, "tokenizer.json", fast)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    specials |= {"sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>"}
    specials |= {"mask_token": {"content": "<mask>", **flags, "lstrip": True}}
    more = {"additional_special_tokens": langs}
    write_json(folder, "special_tokens_map.json", {**specials, **more})
    settings = {**specials, "src_lang": None, "tgt_lang": None, "tokenizer_class": "NllbTokenizer"}
    write_json(folder, "tokenizer_config.json", settings)
    _finish(folder, len(words) + len(langs) + 3, seed, config)
    return langs


def _finish(folder, rows, seed, config):
    write_json(folder, "config.json", {**CONFIG, "vocab_size": rows, **config})
    save_file(tensors(rows, seed, **config), folder / "model.safetensors", {"format": "pt"})
