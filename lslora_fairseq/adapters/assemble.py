"""``lslora assemble``: a checkpoint out of a base model and adapter files."""

from argparse import Namespace

EXAMPLES = """\
examples:
  lslora assemble --base model.pt --adapters adapters --out assembled.pt
      all languages of a folder on the base model that they were trained on
  lslora assemble --base model.pt --adapters run1/fr.safetensors run2/wo.safetensors --out both.pt
      languages of several runs over one base model

The checkpoint is one like those of fairseq-train: it decodes, is evaluated, and is trained further
with --finetune-from-model. Without writing one, --lora-adapters does the same for fairseq-generate,
fairseq-interactive, fairseq-train and lslora evaluate.
"""


def add_arguments(parser):
    add = parser.add_argument
    add("--base", metavar="BASE", required=True, help="checkpoint of the stock base model")
    add(
        "--adapters", metavar="DIR|FILE", nargs="+", required=True,
        help="files that lslora extract wrote, and folders of them",
    )  # fmt: skip
    add("--out", metavar="CHECKPOINT", required=True, help="the file to write")


def run(args):
    """Writes the checkpoint; returns the exit status."""
    from lslora_fairseq import checkpoints
    from lslora_fairseq.adapters.assembly import assembled
    from lslora_fairseq.errors import listed

    adapters, content, changed = assembled(args.base, args.adapters)
    checkpoints.write_checkpoint(args.out, {**content, **_options(content, changed)})
    print(f"{args.out}: adapters of {listed(adapters.files)} on {args.base}")
    return 0


def _options(state, changed):
    """``args`` and ``cfg`` of a checkpoint with some options changed, of model and task."""
    task = "translation_multi_lslora"
    changed = {**changed, "task": task}
    found = {}
    if state.get("args"):
        found["args"] = Namespace(**{**vars(state["args"]), **changed})
    if state.get("cfg"):
        from omegaconf import OmegaConf

        cfg = dict(state["cfg"])
        for group, name in (("model", changed["_name"]), ("task", task)):
            section = cfg.get(group)
            if isinstance(section, Namespace):
                section = vars(section)
            elif OmegaConf.is_config(section):
                section = OmegaConf.to_container(section)
            cfg[group] = Namespace(**{**(section or {}), **changed, "_name": name})
        found["cfg"] = cfg
    return found
