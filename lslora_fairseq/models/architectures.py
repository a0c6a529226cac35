"""Architecture presets: the shapes of the public checkpoints (method, section 7)."""

from fairseq.models import register_model_architecture
from fairseq.models.transformer.transformer_legacy import base_architecture, tiny_architecture

from lslora_fairseq.models import lslora_transformer  # noqa: F401  registers the model

# name: (layers of encoder and of decoder, d, inner dimension of the feed-forward layers)
SHAPES = {
    "lslora_m2m_124_175m": (6, 512, 2048),
    "lslora_m2m_124_615m": (12, 1024, 4096),
    "lslora_m2m_100_418m": (12, 1024, 4096),
    "lslora_m2m_100_1b2": (24, 1024, 8192),
    "lslora_nllb_200_600m": (12, 1024, 4096),
    "lslora_nllb_200_1b3": (24, 1024, 8192),
    "lslora_nllb_200_3b3": (24, 2048, 8192),
}


def _register(name, layers, dim, ffn_dim):
    @register_model_architecture("lslora_transformer", name)
    def architecture(args):
        """Pre-norm, 16 heads, ReLU, sinusoidal positions, all embeddings shared.

        Dropout as in the public models: 0.1, in attention too, none after the ReLU.
        """
        preset = {"share_all_embeddings": True, "attention_dropout": 0.1}
        for stack in ("encoder", "decoder"):
            preset.update(
                {
                    f"{stack}_layers": layers,
                    f"{stack}_embed_dim": dim,
                    f"{stack}_ffn_embed_dim": ffn_dim,
                    f"{stack}_attention_heads": 16,
                    f"{stack}_normalize_before": True,
                }
            )
        for option, value in preset.items():
            setattr(args, option, getattr(args, option, value))
        base_architecture(args)


register_model_architecture("lslora_transformer", "lslora_transformer")(base_architecture)
register_model_architecture("lslora_transformer", "lslora_transformer_tiny")(tiny_architecture)
for _name, _shape in SHAPES.items():
    _register(_name, *_shape)
