"""Rules about what a stage draws from: the weights of its sources, and the lengths of their documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moba_train.config.decode import closest
from moba_train.config.rules import at_least
from moba_train.config.schema import SourceConfig, SourceLengths, StageConfig
from moba_train.errors import ConfigError


def doc_floor(source: SourceConfig, lengths: SourceLengths) -> int:
    """Tokens that a document of the source must have to be drawn in the stage."""
    return source.min_doc_tokens if lengths.min_doc_tokens == "inherit" else lengths.min_doc_tokens


def mix_errors(stage: StageConfig, where: str, sources: Mapping[str, SourceConfig]) -> Iterator[ConfigError]:
    """What is wrong with `mix` and `lengths` of a stage; `where` is its key ("stages.0"), `sources` data.sources."""
    known = ", ".join(sources) or "(no sources)"
    if not stage.mix:
        fix, what = "name its sources and their weights", "the stage draws from no source"
        yield ConfigError(what, where=f"{where}.mix", got="{}", allowed=known, fix=fix)
    for name, weight in stage.mix.items():
        if name not in sources:
            yield ConfigError(
                "the mix names a source that does not exist",
                where=f"{where}.mix.{name}",
                got=name,
                allowed=known,
                fix=f"add [data.sources.{name}] or correct the name",
            )
        if not weight > 0:
            yield ConfigError(
                "a mix weight must be positive",
                where=f"{where}.mix.{name}",
                got=weight,
                allowed="> 0",
                fix="leave a source out of the mix to switch it off",
            )
    yield from lengths_errors(stage, where, sources)


def lengths_errors(stage: StageConfig, where: str, sources: Mapping[str, SourceConfig]) -> Iterator[ConfigError]:
    """What is wrong with `lengths` of a stage; arguments as for `mix_errors`."""
    for name, lengths in stage.lengths.items():
        key = f"{where}.lengths.{name}"
        if name in sources and name in stage.mix:
            yield from _source_errors(lengths, key, sources[name], stage.seq_len)
            continue
        if name not in sources:
            what, allowed = "lengths names a source that does not exist", [*sources]
            meant = closest(name, allowed)
            fix = f"did you mean {where}.lengths.{meant}?" if meant else f"correct the name, or remove {key}"
        else:
            what, allowed = "lengths names a source that the stage does not draw from", [*stage.mix]
            fix = f"give {name} a weight in {where}.mix, or remove {key}"
        yield ConfigError(what, where=key, got=name, allowed=", ".join(allowed) or "(no sources)", fix=fix)


def _source_errors(lengths: SourceLengths, key: str, source: SourceConfig, seq_len: int) -> Iterator[ConfigError]:
    is_own = lengths.min_doc_tokens != "inherit"
    floor, long, share = doc_floor(source, lengths), lengths.long_doc_tokens, lengths.long_share
    if is_own:
        yield from at_least(floor, 0, f"{key}.min_doc_tokens")
    yield from at_least(long, 0, f"{key}.long_doc_tokens")
    if not 0 <= share <= 1:
        what, fix = "long_share is a share of the source's rows", "write 0.5 for one half"
        yield ConfigError(what, where=f"{key}.long_share", got=share, allowed="0 to 1", fix=fix)
    elif share and not long:
        what, fix = "long_share needs to know which documents are long", "set long_doc_tokens, or remove long_share"
        yield ConfigError(what, where=f"{key}.long_doc_tokens", got=long, allowed="a length above 0", fix=fix)
    elif long > 0 and not share:
        what, fix = "long_doc_tokens says nothing without long_share", "set long_share, or remove long_doc_tokens"
        yield ConfigError(what, where=f"{key}.long_share", got=share, allowed="a share above 0, up to 1", fix=fix)
    elif 0 < long <= floor and share < 1:
        yield ConfigError(
            "all documents that are drawn count as long, so that none is left for the other rows",
            where=f"{key}.long_doc_tokens",
            got=long,
            allowed=f"more than {floor} (min_doc_tokens of {'the stage' if is_own else 'the source'})",
            fix="raise long_doc_tokens, lower min_doc_tokens, or set long_share = 1.0",
        )
    if source.packing == "whole" and max(floor, long) > seq_len >= 1:
        yield ConfigError(
            "no whole document of this length fits a row",
            where=f"{key}.{'long_doc_tokens' if long > floor else 'min_doc_tokens'}",
            got=max(floor, long),
            allowed=f"at most {seq_len} (seq_len)",
            fix='lower it, raise seq_len, or set packing = "split"',
        )
