"""Every option of language-specific LoRA and of pruning: help text, defaults, validation."""

import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Optional, get_args

from lslora_fairseq.errors import ConfigError, listed
from lslora_fairseq.languages import Languages
from lslora_fairseq.lora import plan
from lslora_fairseq.pruning.schedule import Schedule

_ENCODER_DEFAULT = "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,fc1,fc2"
_DECODER_DEFAULT = (
    "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,"
    "encoder_attn.q_proj,encoder_attn.k_proj,encoder_attn.v_proj,fc1,fc2"
)


# What adapters that are begun anew have where the options are silent, in a model that is as wide. A
# checkpoint's options say what it has, and where they do not, it is older than the option and has
# none.
NEW_ADAPTERS = {"lora_shared_rank": 16, "lora_embedding_rank": 48}


def _option(default, text):
    return field(default=default, metadata={"help": text})


class Options:
    """A dataclass of options. fairseq's own takes seconds to import, and may be broken where
    ``lslora doctor`` is to tell."""

    @classmethod
    def add_options(cls, parser, defaults=True):
        """Adds an option for each field; without *defaults*, what is not given is not set by us."""
        for option in fields(cls):
            (kind, *_) = get_args(option.type) or (option.type,)  # of Optional[kind]
            how = {"action": "store_true"} if kind is bool else {"type": kind}
            if defaults:
                how["default"] = option.default
            name = f"--{option.name.replace('_', '-')}"
            parser.add_argument(name, help=option.metadata["help"], **how)

    @classmethod
    def from_namespace(cls, args):
        """The options that *args* has, others at their defaults."""
        names = [option.name for option in fields(cls)]
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})


@dataclass
class LSLoConfig(Options):
    """Where the adapters sit and how large they are; saved with every checkpoint."""

    lora_tiers: Optional[str] = _option(
        None,
        "languages by resource tier: 'high=en,fr;medium=nl;low=oc,wo', or a TSV file of lines "
        "code<TAB>tier (required unless a checkpoint is resumed)",
    )
    lora_rank: str = _option(
        "4",
        "rank of every adapter, or of each tier: 'high=2,medium=2,low=8'; a language code may "
        "stand for a tier and wins over it (default: 4)",
    )
    lora_alpha: Optional[str] = _option(
        None,
        "adapters are scaled by alpha / rank; a number, or one for each tier or language like "
        "--lora-rank (default: alpha = rank, no scaling)",
    )
    lora_shared_rank: int = _option(
        0,
        "rank of one more adapter beside those of the languages, in the same linears, that all "
        "languages share: what they all need to learn is learned from all of them; 0 for none, and "
        "with --lora-rank 0 it is the only one, plain LoRA (default of new adapters: "
        f"{NEW_ADAPTERS['lora_shared_rank']})",
    )
    lora_shared_alpha: Optional[float] = _option(
        None, "alpha of the shared adapters (default: their rank, no scaling)"
    )
    lora_embedding_rank: int = _option(
        0,
        "rank of an adapter of the token embeddings, which all languages share; it acts wherever "
        "they do: encoder, decoder and output projection; 0 for none (default of new adapters: "
        f"{NEW_ADAPTERS['lora_embedding_rank']} where these share one matrix)",
    )
    lora_train_languages: Optional[str] = _option(
        None,
        "comma-separated codes: a further stage trains the adapters of these languages alone, and "
        "keeps all others, the shared ones too, as its checkpoint has them; directions without "
        "these languages stay what they were, to the last bit (default: all are trained)",
    )
    lora_train_tokens: Optional[str] = _option(
        None,
        "comma-separated codes: the embedding row of these languages' tokens is trained too, as a "
        "part of their adapters; 'none' for none (default: of languages whose token is new to the "
        "base model, where embeddings are one matrix)",
    )
    lora_init_from: Optional[str] = _option(
        None,
        "'wo=fr,sd=ur': the adapters of a language that a stage adds start as those of another "
        "one, and so does the row of its token if that is new to the base model (default: adapters "
        "that change nothing, and a random row)",
    )
    lora_dropout: float = _option(
        0.0, "probability of dropping an entry of the adapters' input in training (default: 0)"
    )
    encoder_target_modules: str = _option(
        _ENCODER_DEFAULT,
        "linears of an encoder layer that get adapters, comma-separated; valid: "
        f"{', '.join(plan.MODULES['encoder'])}; 'none' for none (default: {_ENCODER_DEFAULT})",
    )
    decoder_target_modules: str = _option(
        _DECODER_DEFAULT,
        "linears of a decoder layer that get adapters; valid: "
        f"{', '.join(plan.MODULES['decoder'])}; 'none' for none (default: {_DECODER_DEFAULT})",
    )
    encoder_lora_layers: Optional[str] = _option(
        None, "encoder layers that get adapters, such as 0-5,8 (default: all)"
    )
    decoder_lora_layers: Optional[str] = _option(
        None, "decoder layers that get adapters (default: all)"
    )
    encoder_index_side: Optional[str] = _option(
        None,
        "language that indexes each encoder layer: source, target, or counts such as "
        "'source*9,target*3' (default: the first three quarters source, the rest target)",
    )
    decoder_index_side: Optional[str] = _option(
        None, "language that indexes each decoder layer (default: target)"
    )
    lora_weight_learning: bool = _option(
        False,
        "give every site an adapter of the source and one of the target language, and learn how "
        "much of each a layer wants; 'lslora sides' reads the result",
    )
    lora_shape: str = _option(
        "full",
        "full: adapters span the whole linear; square: feed-forward adapters see only the first "
        "d of the inner dimension, as in the authors' code (default: full)",
    )


LORA_FIELDS = tuple(f.name for f in fields(LSLoConfig))


@dataclass
class StartConfig(Options):
    """What a command begins with; no part of what a model is."""

    lora_adapters: Optional[str] = _option(
        None,
        "adapter files that 'lslora extract' wrote, or folders of them, comma-separated: they are "
        "loaded onto the stock base model of --path or --finetune-from-model",
    )

    lora_save: str = _option(
        "all",
        "'adapters': checkpoints of this run leave out the base model of --finetune-from-model and "
        "tell where it is; all else is in them (default: all)",
    )
    lora_base: Optional[str] = _option(
        None,
        "where the base model is that checkpoints leave out, if it was moved (default: where it "
        "was, or beside the checkpoint)",
    )
    lora_base_dtype: str = _option(
        "fp32",
        "bf16 or fp16: the frozen base takes half the memory and computes in that dtype, while "
        "adapters stay in fp32; checkpoints hold the base as it was (default: fp32)",
    )

    @property
    def places(self):
        """The files and folders."""
        return [part.strip() for part in (self.lora_adapters or "").split(",") if part.strip()]


@dataclass
class PruningConfig(Options):
    """The gradual pruning schedule of the ``pruned_*`` optimizers (method, section 4)."""

    pruning_final_sparsity: float = _option(
        0.9,
        "share of entries of the languages' adapters removed at the end, in [0, 1); 0 prunes "
        "nothing (default: 0.9)",
    )
    pruning_begin: int = _option(
        2, "epoch or update from which the share of removed entries rises (default: 2)"
    )
    pruning_duration: int = _option(
        10, "epochs or updates over which it rises, by a cubic law (default: 10)"
    )
    pruning_unit: str = _option("epoch", "unit of begin and duration: epoch or update")
    pruning_scope: str = _option(
        "language",
        "what shares one threshold: language (each language ends at the same sparsity) or layer "
        "(the languages of a layer compete)",
    )
    pruning_target: str = _option(
        "B", "factors that are pruned: B, or AB (each with a threshold of its own)"
    )
    pruning_masks: str = _option(
        "keep",
        "what a further stage does with the entries that its --finetune-from-model has pruned: "
        "keep (they stay zero) or reset (they may grow again, until this run prunes)",
    )

    def validated(self):
        """Returns the :class:`Schedule`.

        Raises:
            ConfigError: an option is out of range; the message names it.
        """
        for option, value, valid in (
            ("--pruning-scope", self.pruning_scope, ("language", "layer")),
            ("--pruning-target", self.pruning_target, ("B", "AB")),
            ("--pruning-masks", self.pruning_masks, ("keep", "reset")),
        ):
            if value not in valid:
                raise ConfigError(f"{option} {value} must be {' or '.join(valid)}")
        return Schedule(
            self.pruning_final_sparsity,
            self.pruning_begin,
            self.pruning_duration,
            self.pruning_unit,
        )

    def warning(self, max_epoch, max_update):
        """One line if the schedule ends after the run does, else None (0 = no limit)."""
        limit = max_epoch if self.pruning_unit == "epoch" else max_update
        last = limit if self.pruning_unit == "epoch" else limit - 1  # updates done before the last
        end = self.pruning_begin + self.pruning_duration
        if limit and self.pruning_final_sparsity and end > last:
            return (
                f"the pruning schedule ends at {self.pruning_unit} {end}, after the run's last "
                f"({last}): --pruning-final-sparsity {self.pruning_final_sparsity} is not "
                "reached; lower --pruning-begin or --pruning-duration, or train longer"
            )
        return None


@dataclass(frozen=True)
class AdapterPlan:
    """A validated :class:`LSLoConfig`, resolved for one model.

    Attributes:
        languages: the inventory
        ranks, alphas: one for each language, in the inventory's order
        sites: every linear with adapters of languages, with weight learning once for each side
        weight_learning: whether each layer learns how much of either side it wants
        shared_sites: every linear with an adapter that all languages share
        shared_rank, shared_alpha: of these
        trained: the languages whose adapters are trained, in the inventory's order, where all
            others and what is shared stay as they are; None where everything is trained
        embedding_site: the output projection, if it and the embeddings have an adapter
        embedding_rank: of that
        tokens: the languages whose token's row is trained, in the inventory's order
        dim: columns of such a row
    """

    languages: Languages
    ranks: tuple
    alphas: tuple
    sites: tuple
    dropout: float
    weight_learning: bool = False
    shared_sites: tuple = ()
    shared_rank: int = 0
    shared_alpha: float = 0
    trained: Optional[tuple] = None
    embedding_site: Optional[plan.Site] = None
    embedding_rank: int = 0
    tokens: tuple = ()
    dim: int = 0

    @property
    def all_sites(self):
        return self.shared_sites + self.sites

    def needs(self, side):
        """Whether any site is indexed by this side's language."""
        return any(site.side == side for site in self.sites)

    def trains(self, owner):
        """Whether a language's adapters are trained; any other owner stands for what is shared."""
        return self.trained is None or owner in self.trained

    def table(self, base_parameters):
        """Trainable parameters per tier, side and module type, and their share of the base."""
        languages = self.languages
        rows = []
        trained = [code for code in languages.codes if self.trains(code)]
        tiers = dict.fromkeys(map(languages.tier, trained))
        for tier in tiers if self.sites else ():
            members = [languages.index(code) for code in trained if languages.tier(code) == tier]
            count = Counter()
            for site in self.sites:
                count[site.side, site.module] += sum(site.entries(self.ranks[i]) for i in members)
            for side in plan.SIDES:
                rows += [(tier, "", *key, n) for key, n in count.items() if key[0] == side]
            rows.append((tier, len(members), "all", "all", sum(count.values())))
        if self.shared_sites:
            count = Counter()
            for site in self.shared_sites if self.trains(plan.SHARED) else ():
                count[site.module] += site.entries(self.shared_rank)
            rows += [("for all", "", plan.SHARED, *item) for item in count.items()]
            name = "for all" if self.trains(plan.SHARED) else "kept"
            rows.append((name, len(languages), plan.SHARED, "all", sum(count.values())))
        if self.embedding_site:
            is_trained = self.trains(plan.SHARED)
            count = is_trained * self.embedding_site.entries(self.embedding_rank)
            name = "for all" if is_trained else "kept"
            rows.append((name, len(languages), plan.SHARED, "embeddings", count))
        if self.tokens:
            entries = len(self.tokens) * self.dim
            rows.append(("tokens", len(self.tokens), "own", "embeddings", entries))
        kept = len(languages) - len(trained)
        if kept:
            rows.append(("kept", kept, "all", "all", 0))
        total = sum(row[-1] for row in rows if row[1])
        if self.weight_learning and self.trained is None:  # w of either side in every layer
            layers = {(site.stack, site.layer) for site in self.sites}
            rows.append(("", "", "both", "side weights", 2 * len(layers)))
            total += 2 * len(layers)
        rows.append(("total", len(languages), "all", "all", total))
        form = "{:<12}{:>9}  {:<8}{:<20}{:>14}{:>10}".format
        return "\n".join(
            [form("tier", "languages", "side", "module", "trainable", "of base")]
            + [form(*row[:4], f"{row[4]:,}", f"{row[4] / base_parameters:.3%}") for row in rows]
        )


def resolve(config, layers, dims):
    """Validates a config against a model and resolves it.

    Args:
        config: an :class:`LSLoConfig`
        layers: stack -> number of layers
        dims: stack -> module name -> (in_features, out_features); under ``embeddings`` (d, words)
            if these are one matrix

    Returns:
        :class:`AdapterPlan`; *config* is normalised in place to a form that needs no other file.

    Raises:
        ConfigError: naming the option and the remedy.
    """
    if not config.lora_tiers:
        raise ConfigError(
            "--lora-tiers is missing: list the languages by tier, such as "
            "'high=en,fr;low=oc', or name a TSV file"
        )
    if config.lora_shape not in ("full", "square"):
        raise ConfigError(f"--lora-shape {config.lora_shape} must be full or square")
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"--lora-dropout {config.lora_dropout} must lie in [0, 1)")
    languages = Languages.parse(config.lora_tiers)
    ranks = languages.per_language(config.lora_rank, "--lora-rank", int)
    alphas = ranks
    if config.lora_alpha is not None:
        alphas = languages.per_language(config.lora_alpha, "--lora-alpha", float)
        for code, alpha in zip(languages.codes, alphas):
            _check_alpha(alpha, code, "--lora-alpha")
    sites, shared_sites = [], []
    for stack in ("encoder", "decoder"):
        chosen = plan.parse_layers(
            getattr(config, f"{stack}_lora_layers"), layers[stack], f"--{stack}-lora-layers"
        )
        text = getattr(config, f"{stack}_target_modules")
        modules = ()
        if text != "none":
            modules = plan.parse_target_modules(text, stack, f"--{stack}-target-modules")
        for found, indexed in (
            (sites, _index_sides(config, stack, layers[stack])),
            (shared_sites, ((plan.SHARED,),) * layers[stack]),
        ):
            found += plan.plan_sites(
                stack, chosen, indexed, modules, dims[stack], config.lora_shape
            )
    shared_rank, shared_alpha = config.lora_shared_rank, config.lora_shared_alpha
    if shared_rank:
        plan.check_ranks([shared_rank], ["all languages"], shared_sites, "--lora-shared-rank")
        if shared_alpha is None:
            shared_alpha = shared_rank
        _check_alpha(shared_alpha, "all languages", "--lora-shared-alpha")
    elif shared_alpha is not None:
        raise ConfigError(
            "--lora-shared-alpha scales the shared adapters, and there are none: add "
            "--lora-shared-rank, or leave it out"
        )
    embedding_rank, embedding_site = config.lora_embedding_rank, None
    if embedding_rank:
        embedding_site = _embedding_site(embedding_rank, dims.get("embeddings"))
    if (shared_rank or embedding_rank) and not any(ranks):
        _check_plain(config)
        sites, alphas = (), ranks
    else:
        plan.check_ranks(ranks, languages.codes, sites, "--lora-rank")
    trained = None
    if config.lora_train_languages is not None:
        trained = languages.subset(config.lora_train_languages, "--lora-train-languages")
    tokens = _tokens(config, languages, trained, "embeddings" in dims)
    config.lora_tiers = languages.spec
    return AdapterPlan(
        languages,
        ranks,
        alphas,
        tuple(sites),
        config.lora_dropout,
        config.lora_weight_learning,
        tuple(shared_sites) if shared_rank else (),
        shared_rank,
        shared_alpha or 0,
        trained,
        embedding_site,
        embedding_rank,
        tokens,
        dims["embeddings"][0] if tokens else 0,
    )


def _tokens(config, languages, trained, is_one_matrix):
    """The languages whose token's row is trained."""
    option, text = "--lora-train-tokens", config.lora_train_tokens
    if text in (None, "none"):
        return ()
    found = languages.subset(text, option)
    kept = [code for code in found if trained is not None and code not in trained]
    if kept:
        raise ConfigError(
            f"{option} names {listed(kept)}, whose adapters --lora-train-languages keeps: leave "
            "them out of the one, or add them to the other"
        )
    if not is_one_matrix:
        raise ConfigError(f"{option} trains {_ONE_MATRIX}")
    return found


_ONE_MATRIX = (
    "embeddings that are one matrix in encoder, decoder and output projection, and here they are "
    "several: leave it out (M2M-100 and NLLB have one, --share-all-embeddings)"
)


def _embedding_site(rank, dims):
    """The site of the embeddings' adapter.

    Args:
        dims: (d, words), or None where encoder, decoder and output projection do not share one
            matrix
    """
    option = "--lora-embedding-rank"
    if dims is None:
        raise ConfigError(f"{option} adapts {_ONE_MATRIX}")
    site = plan.Site("decoder", None, "output_projection", plan.SHARED, *dims)
    plan.check_ranks([rank], ["the embeddings"], [site], option)
    return site


def _check_plain(config):
    """Raises ConfigError for options that want adapters of languages, where there are none."""
    for option, is_given, why in (
        ("--lora-weight-learning", config.lora_weight_learning, "weighs adapters of languages"),
        (
            "--lora-train-languages",
            config.lora_train_languages is not None,
            "names adapters of languages to train",
        ),
        ("--lora-alpha", config.lora_alpha is not None, "scales adapters of languages"),
        (
            "--lora-train-tokens",
            config.lora_train_tokens not in (None, "none"),
            "trains the tokens' rows with adapters of languages",
        ),
    ):
        if is_given:
            more = ", or give --lora-shared-alpha" if option == "--lora-alpha" else ""
            raise ConfigError(
                f"{option} {why}, and with --lora-rank 0 there are none: leave it out{more}, or "
                "give --lora-rank"
            )


def _check_alpha(alpha, owner, option):
    if not 0 < alpha < math.inf:
        raise ConfigError(
            f"{option}: {alpha} of {owner} must be positive; without the option adapters are not "
            "scaled (alpha = rank)"
        )


def _index_sides(config, stack, layers):
    """The sides that index each layer of a stack; the option's default is filled in."""
    name, option = f"{stack}_index_side", f"--{stack}-index-side"
    text = getattr(config, name)
    if config.lora_weight_learning:
        if text is not None:
            raise ConfigError(
                f"{option} {text} and --lora-weight-learning exclude each other: leave out "
                f"{option} to learn which side should index a layer, or --lora-weight-learning "
                "to give it"
            )
        return (plan.SIDES,) * layers
    if text is None:
        text = plan.default_encoder_sides(layers) if stack == "encoder" else "target"
        setattr(config, name, text)
    return tuple((side,) for side in plan.parse_index_sides(text, layers, option))
