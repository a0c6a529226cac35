"""From a checkpoint to the content of adapter files."""

import torch

from lslora_fairseq.adapters import fingerprint, packing
from lslora_fairseq.adapters.files import encode, row_name
from lslora_fairseq.adapters.header import COMMON, PROJECTION, TOKENS, Header, Module, is_code
from lslora_fairseq.analysis.trained import by_adapters, owners, shared_sites
from lslora_fairseq.errors import ConfigError
from lslora_fairseq.identity import Identity, plugin_version
from lslora_fairseq.keys import EMBEDDINGS, RECORD
from lslora_fairseq.lora.plan import SHARED, adapter_columns


class Extraction:
    """What a checkpoint gives to adapter files.

    Args:
        trained: :class:`~lslora_fairseq.analysis.trained.Trained`

    Raises:
        ConfigError: it learns the weights of sides, does not tell its dictionary, or has a language
            whose code cannot name a file.
    """

    def __init__(self, trained):
        self.trained, self.plan = trained, trained.plan
        if self.plan.weight_learning:
            raise ConfigError(
                f"{trained.path} was trained with --lora-weight-learning, to find out which side "
                "should index a layer: read that with lslora sides, and train again with it"
            )
        self.codes = self.plan.languages.codes if self.plan.sites else ()
        for code in self.codes:
            if not is_code(code):
                raise ConfigError(
                    f"{trained.path} has adapters of {code!r}, which cannot name a file: rename "
                    "the language (ASCII letters, digits, _ and -; not 'shared')"
                )
        record = trained.weights.get(RECORD)
        self.identity = record is not None and Identity.from_record(record, trained.path)
        if not self.identity or None in (self.identity.langs, self.identity.lines):
            raise ConfigError(
                f"{trained.path} does not tell its dictionary, as an earlier version wrote it: "
                "load it in one more run (fairseq-train --finetune-from-model … --lr 0 "
                "--max-update 1), and name what that saves"
            )
        lines = self.identity.lines
        self._shared = self._shared_sum(lines)
        self._common = {
            "options": {name: getattr(trained.config, name) for name in COMMON},
            "tokens": _tokens(trained.options, self.identity),
            "langs": self.identity.langs,
            "extra_data": self.identity.extra_data,
            "lines": lines,
            "appended": self.identity.appended,
            "base": self.identity.base or fingerprint.of_base(trained.weights, lines),
            "shared": self._shared,
            "plugin": plugin_version(),
        }

    def files(self, codes, dtype):
        """All files of some languages, that of what they share among them.

        Args:
            codes: the languages
            dtype: one of ``packing.DTYPES``, of the values

        Yields:
            owner, :class:`Header`, the file's bytes

        Raises:
            ConfigError: a value is no number, or none in this dtype.
        """
        for code in codes:
            header, tensors = self.language(code, dtype)
            yield code, header, encode(header, tensors)
        if self._shared is not None:
            header, tensors = self.shared(dtype)
            yield SHARED, header, encode(header, tensors)

    def language(self, code, dtype):
        """The file of one language: :class:`Header`, and name -> tensor."""
        token, tier = self.identity.token(code), self.plan.languages.tier(code)
        about = {"language": code, "tier": tier, "token": token, "tiers": None}
        return self._file(code, dtype, self.plan.sites, self._rows(token), **about)

    def shared(self, dtype):
        """The file of what all languages share; as :meth:`language`."""
        languages, tiers = self.plan.languages, None
        if not self.plan.sites:
            tiers = {code: languages.tier(code) for code in languages.codes}
        about = {"language": None, "tier": None, "token": None, "tiers": tiers}
        return self._file(SHARED, dtype, shared_sites(self.plan), {}, **about)

    def _file(self, owner, dtype, sites, rows, **about):
        modules, entries, kept = [], [0, 0], [0, 0]
        tensors = {row_name(key): row for key, row in rows.items()}
        for key, ours in by_adapters(sites).items():
            weight, mask = self._of(owner, key, ours[0])
            columns, _ = adapter_columns(ours)
            for site in ours:
                a, b = columns[site.module]
                factors = weight[:, a], weight[:, b].t()
                masks = mask[:, a], mask[:, b].t()
                for i, m in enumerate(masks):
                    entries[i] += m.numel()
                    kept[i] += int(m.sum())
                tensors.update(packing.pack(site.name, factors, masks, packing.DTYPES[dtype]))
                modules.append(self._module(owner, site))
        self._check_finite(owner, tensors, dtype)
        counts = {"dtype": dtype, "entries": entries, "kept": kept}
        header = Header(modules=tuple(modules), rows=[*rows], **counts, **about, **self._common)
        return header, tensors

    def _of(self, owner, key, site):
        """An owner's matrix of a layer, and its mask: (rank, columns)."""
        ranks = owners(self.plan, site)
        rows = self.trained.kept(key).split([*ranks.values()])
        return self.trained.weights[f"{key}.lora_{owner}"], rows[[*ranks].index(owner)]

    def _module(self, owner, site):
        rank = owners(self.plan, site)[owner]
        alpha = rank  # of the embeddings' adapter, which is not scaled
        if owner != SHARED:
            alpha = self.plan.alphas[self.plan.languages.index(owner)]
        elif site.name != PROJECTION:
            alpha = self.plan.shared_alpha
        return Module(site.name, site.side, site.in_features, site.out_features, rank, alpha)

    def _rows(self, token):
        """The embeddings of a token beyond the dictionary file, by the matrix's key; of several
        equal ones the first."""
        if token not in self.identity.appended:
            return {}
        place, rows = self.identity.lines + self.identity.appended.index(token), {}
        for key in EMBEDDINGS:
            if key in self.trained.weights:
                row = self.trained.weights[key][place].float()
                if not any(torch.equal(row, rows[k]) for k in list(rows)[:1]):
                    rows[key] = row.clone()
        return rows

    def _shared_sum(self, lines):
        """The fingerprint of what all languages share, or None; columns of words beyond the
        dictionary file, of which each run may have others, do not count."""
        found = {}
        for key, sites in by_adapters(shared_sites(self.plan)).items():
            weight, mask = self._of(SHARED, key, sites[0])
            if sites[0].name == PROJECTION:
                weight, mask = (w[:, : sites[0].in_features + lines] for w in (weight, mask))
            found[key], found[f"{key}.mask"] = weight, mask
        if not found:
            return None
        return fingerprint.fingerprint({**found, "alpha": torch.tensor(self.plan.shared_alpha)})

    def _check_finite(self, owner, tensors, dtype):
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                remedy = "name another checkpoint"
                if dtype == "fp16":
                    remedy = "give --dtype bf16 or fp32, or name another checkpoint"
                raise ConfigError(
                    f"{self.trained.path}: {name} of {owner} holds values that are no numbers in "
                    f"{dtype}: {remedy}"
                )


def _tokens(options, identity):
    langtoks = options.get("langtoks") or {}
    found = {
        "encoder_langtok": options.get("encoder_langtok"),
        "decoder_langtok": bool(options.get("decoder_langtok")),
        "lang_tok_replacing_bos_eos": bool(options.get("lang_tok_replacing_bos_eos")),
        "lang_tok_style": identity.lang_tok_style,
        "langtoks_specs": identity.langtoks_specs,
        "langtoks": {category: list(specs) for category, specs in langtoks.items()},
    }
    return {name: found[name] for name in TOKENS}
