"""Hand-made checkpoints of adapters, whose numbers can be counted by hand."""

from argparse import Namespace

import torch

from lslora_fairseq.config import LSLoConfig, resolve
from lslora_fairseq.lora.plan import MODULES, SHARED, SIDES, adapter_columns

LAYERS = {"encoder": 3, "decoder": 2}
DIM, FFN, ROWS = 4, 8, 20
OPTIONS = {
    "lora_tiers": "high=de,en;low=oc",
    "lora_rank": "2",
    "lora_weight_learning": False,
    "pruning_scope": "layer",
    "pruning_target": "B",
    "pruning_final_sparsity": 0.75,
}


def make(keep=None, logits=None, **options):
    """A checkpoint as fairseq-train writes it: frozen weights, adapters, masks, options.

    Args:
        keep: (site, language code) -> entries of B that survive (the first ones); None for all.
            The code of adapters that all languages share is ``shared``
        logits: (stack, layer) -> w of (source, target), with weight learning
        options: replace those above

    Returns:
        the content of the file
    """
    options = {**OPTIONS, **options}
    sizes = {
        module: (FFN, DIM) if module == "fc2" else (DIM, FFN) if module == "fc1" else (DIM, DIM)
        for module in MODULES["decoder"]
    }
    dims = {**dict.fromkeys(LAYERS, sizes), "embeddings": (DIM, ROWS)}
    plan = resolve(LSLoConfig.from_namespace(Namespace(**options)), LAYERS, dims)
    embedding = torch.randn(ROWS, DIM)
    model = {"encoder.version": torch.tensor([3.0])}
    for key in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"):
        model[f"{key}.weight"] = embedding
    for stack, count in LAYERS.items():
        for layer in range(count):
            prefix = f"{stack}.layers.{layer}"
            for module in MODULES[stack]:
                n_in, n_out = sizes[module]
                model[f"{prefix}.{module}.weight"] = torch.randn(n_out, n_in)
            for side in (*SIDES, SHARED):
                sites = [
                    s for s in plan.all_sites if (s.stack, s.layer, s.side) == (stack, layer, side)
                ]
                ranks = dict(zip(plan.languages.codes, plan.ranks))
                if side == SHARED:
                    ranks = {SHARED: plan.shared_rank}
                if sites:
                    _add_adapters(model, f"{prefix}.{side}_adapters", sites, ranks, keep)
            if plan.weight_learning and any(
                (s.stack, s.layer) == (stack, layer) for s in plan.sites
            ):
                w = (logits or {}).get((stack, layer), (0.0, 0.0))
                model[f"{prefix}.side_weights.logits"] = torch.tensor([w])
    if plan.embedding_site:
        ranks = {SHARED: plan.embedding_rank}
        _add_adapters(model, "embedding_adapters", [plan.embedding_site], ranks, keep)
    return {"model": model, "args": Namespace(**options)}


def _add_adapters(model, prefix, sites, ranks, keep):
    columns, width_A = adapter_columns(sites)
    width = width_A + sum(site.out_features for site in sites)
    masks = []
    for code, rank in ranks.items():
        mask = torch.ones(rank, width, dtype=torch.bool)
        for site in sites:
            if keep is not None:
                part = torch.arange(rank * site.out_features) < keep(site, code)
                mask[:, columns[site.module][1]] = part.view(rank, -1)
        model[f"{prefix}.lora_{code}"] = torch.randn(rank, width) * mask
        masks.append(mask)
    model[f"{prefix}.pruned"] = (~torch.cat(masks)).to(torch.uint8)


def save(folder, content):
    """Path of the written checkpoint."""
    path = folder / "checkpoint_last.pt"
    torch.save(content, path)
    return str(path)  # torch 2.2 maps no other kind of path
