"""The configuration of a run: frozen dataclasses, one per part, a docstring under every field.

Pure Python: this package imports no torch, so that `moba-train plan` answers at once. Defaults are those of a small
run; nothing is None (where a value can be chosen by the program it reads "auto", where it comes from elsewhere in the
configuration it reads "inherit"). Lengths are in tokens, times in seconds, learning rates are peak values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and its extension to longer sequences."""

    base: float = 10000.0
    """Base of the geometric series of wave lengths."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """none; linear = position interpolation (arXiv 2306.15595); llama3 = by wave length, as Llama 3.1; yarn = arXiv
    2309.00071."""
    factor: float = 1.0
    """Extension factor: new length / original length. 1.0 leaves every angle as it is."""
    original_seq_len: int = 8192
    """Length the model was trained with before the extension (llama3 and yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wave lengths above original_seq_len / low_freq_factor are interpolated in full."""
    high_freq_factor: float = 4.0
    """llama3: wave lengths below original_seq_len / high_freq_factor stay as they are."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original length stay as they are."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this over the original length are interpolated in full."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer. `preset` fills in every field that the file does not set itself."""

    preset: str = "custom"
    """custom, or a name from `moba_train.config.presets`: tiny, llama-3.2-1b, llama-3.1-8b, qwen3-8b."""
    num_layers: int = 2
    """Transformer layers, over all pipeline ranks."""
    hidden_size: int = 64
    """Width of the residual stream."""
    ffn_hidden_size: int = 192
    """Inner width of the SwiGLU MLP (of each of its two branches)."""
    num_heads: int = 2
    """Query heads H."""
    num_kv_heads: int = 2
    """Key/value heads K; num_heads % num_kv_heads == 0."""
    head_dim: int = 32
    """Head dimension D; need not be hidden_size / num_heads."""
    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's size and divisible by parallel.tp."""
    vocab_padding: int = 0
    """Rows among them, the last ones, that stand for no token: the model gives them probability 0."""
    tied_head: bool = True
    """Share the embedding with the output head."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys, before RoPE (Qwen3)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2 and 2.5)."""
    key_conv: Literal[0, 3, 5] = 0
    """Width of the depthwise causal convolution over keys (arXiv 2511.11571); 0 = none."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 * num_layers)."""
    init_from: str = ""
    """Folder whose weights a run begins with, at step 0 and with fresh optimizer state: what `moba-train convert
    from-hf` wrote, a run, or a checkpoint. "" = weights are drawn from run.seed. A run that has checkpoints of its own
    goes on from these."""


@dataclass(frozen=True)
class HardwareConfig:
    """What `transport = "auto"` and the plan assume of the machine. Numbers given here replace those of the preset."""

    preset: Literal["auto", "h100", "h200", "a100", "cpu", "measured"] = "auto"
    """auto = by the device; measured = a few exchanges and full attention are timed at start-up. A resumed run keeps
    what it measured as long as mesh and settings are the same."""
    node_ranks: int | Literal["preset"] = "preset"
    """Ranks of the job that share a node."""
    node_gb_s: float | Literal["preset"] = "preset"
    """GB/s (1e9 bytes) of one rank to others of its node, in one direction."""
    cross_gb_s: float | Literal["preset"] = "preset"
    """GB/s of one rank to ranks of other nodes, in one direction."""
    latency_us: float | Literal["preset"] = "preset"
    """Microseconds that a collective takes at least."""
    peer_latency_us: float | Literal["preset"] = "preset"
    """Microseconds more for every other rank that takes part."""
    host_read_us: float | Literal["preset"] = "preset"
    """Microseconds that one host read of a device number costs."""
    attention_tflops: float | Literal["preset"] = "preset"
    """TFLOP/s that attention reaches on one rank, full and MoBA alike, in the precision of the run."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the device mesh: number of ranks = tp * cp * pp * dp."""

    tp: int = 1
    """Tensor-parallel ranks."""
    cp: int = 1
    """Context-parallel ranks: one row is sharded over them."""
    pp: int = 1
    """Pipeline-parallel ranks."""
    dp: int | Literal["auto"] = "auto"
    """Data-parallel ranks; auto = whatever is left of the world size."""
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    """How a row is cut over CP ranks."""
    transport: Literal["auto", "all_gather", "a2a", "a2a+all_gather", "pull", "route_queries"] = "auto"
    """How keys and values reach the queries that attend to them; auto = the cheapest by the cost model, decided once a
    stage for MoBA layers and for full layers."""
    transport_full: Literal["inherit", "auto", "all_gather", "a2a", "a2a+all_gather", "pull"] = "inherit"
    """The same for full layers, in training and evaluation; inherit = transport."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """Numbers of the cost model."""


@dataclass(frozen=True)
class EngineConfig:
    """How a step is executed."""

    kind: Literal["megatron", "deepspeed"] = "megatron"
    """megatron = Megatron-core DDP with the distributed optimizer; deepspeed = the same model under ZeRO, which takes
    tp = pp = 1."""
    zero_stage: Literal[1, 2, 3] = 1
    """deepspeed only: shard optimizer state (1), gradients too (2), weights too (3)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward and backward pass; master weights and optimizer state are fp32."""
    attention_backend: Literal["auto", "reference", "torch", "triton", "flash"] = "auto"
    """Backend of the attention operator (`moba_kernels`)."""
    recompute: Literal["none", "full"] = "none"
    """Activation recompute; full = every layer's forward runs again in the backward pass, with the same routing, and
    its MLP by tiles of tokens."""
    offload: Literal["none", "host"] = "none"
    """host = what recompute keeps of a layer waits in host memory (GPU only, with recompute = "full"). There each
    layer's hidden states take a power of two of bytes, as PyTorch pins memory; `plan` counts it as "parked"."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data- and context-parallel ranks."""
    timeout_s: float = 600.0
    """All ranks have ended within this time after the first began to wait for one that does not come. Longer than
    reading the first rows of a stage, and on CUDA than a whole step; the [watchdog] limits opening data and saving."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the learning-rate schedule over the whole run (all stages together)."""

    lr: float = 3e-3
    """Peak learning rate of stages that say lr = "inherit"."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the run, as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine, or warm-up / stable / linear decay (arXiv 2404.06395)."""
    warmup_tokens: int = 0
    """Linear warm-up from 0, in tokens."""
    decay_tokens: int = 0
    """wsd only: the linear decay spans the last decay_tokens of the run."""
    beta1: float = 0.9
    """First-moment decay."""
    beta2: float = 0.95
    """Second-moment decay."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay (not on norms and biases)."""
    clip_grad: float = 1.0
    """Global gradient-norm clip; 0 = off."""


@dataclass(frozen=True)
class SourceConfig:
    """One tokenised source: a Megatron `.bin/.idx` pair."""

    path: str = ""
    """Path prefix, without `.bin` / `.idx`."""
    packing: Literal["split", "whole"] = "split"
    """split: a document goes on in the next row; whole: rows hold whole documents and end in padding."""
    min_doc_tokens: int = 0
    """Documents shorter than this are left out."""


@dataclass(frozen=True)
class DataConfig:
    """Tokenizer and sources; a stage's `mix` names the sources it draws from."""

    tokenizer: str = ""
    """Path of the sentencepiece model or tokenizer.json that the sources were written with."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Training sources by name."""
    valid: SourceConfig = field(default_factory=SourceConfig)
    """Held-out documents, for the loss by position and as haystacks."""


@dataclass(frozen=True)
class FullLayers:
    """Layers that stay on full attention inside a MoBA stage."""

    first: int = 0
    """The first n layers."""
    last: int = 0
    """The last n layers."""
    every: int = 0
    """Every n-th layer (n, 2n, ... counted from 1); 0 = none."""


@dataclass(frozen=True)
class StageMesh:
    """The device mesh of one stage, where it is not that of [parallel]."""

    tp: int | Literal["inherit"] = "inherit"
    """Tensor-parallel ranks."""
    cp: int | Literal["inherit"] = "inherit"
    """Context-parallel ranks."""
    pp: int | Literal["inherit"] = "inherit"
    """Pipeline-parallel ranks."""
    dp: int | Literal["auto", "inherit"] = "inherit"
    """Data-parallel ranks; auto = whatever is left of the world size."""


@dataclass(frozen=True)
class SourceLengths:
    """Which documents of a source a stage draws, by their length. Lengths are in tokens."""

    min_doc_tokens: int | Literal["inherit"] = "inherit"
    """Documents shorter than this are left out; inherit = that of the source."""
    long_doc_tokens: int = 0
    """Documents of at least this length count as long; 0 = none does, and long_share says nothing."""
    long_share: float = 0.0
    """Share of the source's rows that are cut from long documents alone, the other rows from the others alone: the mix
    of sources stays as it is while long documents come more often (arXiv 2402.10171)."""


@dataclass(frozen=True)
class UntilConfig:
    """When a stage ends before its `tokens` are used up: at a held-out evaluation after which the number it watches has
    not fallen enough. Numbers are losses in nats a token; 0 = not watched. At most one is."""

    loss_plateau: float = 0.0
    """Watch the held-out loss under the stage's attention."""
    trailing_gap: float = 0.0
    """Watch how much higher the held-out loss of trailing positions is under MoBA than under full attention."""
    evaluations: int = 3
    """The stage ends when the lowest value of the last so many evaluations is not below the lowest one before them by
    at least the number above."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of the schedule. Stages follow one another without a restart, unless the mesh changes."""

    name: str = "stage"
    """Shown in the log, the metrics and the report; unique."""
    tokens: int = 0
    """Length of the stage in tokens, the greatest one where `until` may end it; a multiple of tokens_per_step."""
    until: UntilConfig = field(default_factory=UntilConfig)
    """What ends the stage earlier; needs eval.every_steps, and learning rates that do not depend on when it ends."""
    tokens_per_step: int = 0
    """Tokens of one optimizer step over all ranks; a multiple of seq_len."""
    seq_len: int = 0
    """Tokens of one packed row (over all CP ranks)."""
    mix: dict[str, float] = field(default_factory=dict)
    """Share of rows by source name; normalised to sum 1."""
    lengths: dict[str, SourceLengths] = field(default_factory=dict)
    """By source name: length floors, and long documents more often than they are."""
    attention: Literal["moba", "full"] = "moba"
    """Attention of every layer that full_layers does not name."""
    chunk_size: int = 512
    """MoBA chunk size."""
    topk: int = 3
    """Chunks that a query attends to, its own included."""
    select: Literal["head", "group"] = "head"
    """One pick per query head, or one per key/value head."""
    full_layers: FullLayers = field(default_factory=FullLayers)
    """Layers on full attention although the stage is MoBA."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Position embedding of this stage."""
    lr: float | Literal["inherit"] = "inherit"
    """Peak learning rate of this stage; inherit = optimizer.lr."""
    mesh: StageMesh = field(default_factory=StageMesh)
    """Degrees of the mesh in this stage. Where they change, the run saves and ends with exit code 4, and the launcher
    starts it again."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation inside the loop."""

    every_steps: int = 0
    """0 = only at the end of each stage."""
    rows: int = 4
    """Held-out rows per evaluation, all where there are fewer; 0 = no held-out evaluation."""
    buckets: int = 8
    """Position buckets of the loss-by-position curve."""


@dataclass(frozen=True)
class NiahConfig:
    """Needle in a haystack: the grid of `moba-train eval niah`, and a small one inside the loop."""

    lengths: tuple[int, ...] = (256, 512, 1024)
    """Context lengths in tokens, exact."""
    depths: int = 6
    """Number of depths, evenly spaced from 0 % to 100 %."""
    samples: int = 8
    """Samples per cell."""
    every_steps: int = 0
    """Inside the loop: 0 = only at the end of each stage; the loop uses loop_samples per cell and the middle depths."""
    loop_samples: int = 2
    """Samples per cell inside the loop; 0 = no needle evaluation in the loop."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. The last checkpoint and the end of every stage are always kept."""

    every_steps: int = 100
    """0 = only at the end of each stage."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for ever; 0 = none."""
    asynchronous: bool = True
    """Training goes on while files are written; the next save waits for the one before."""


@dataclass(frozen=True)
class RunSection:
    """What concerns the run as a whole."""

    dir: str = "runs/default"
    """Run folder: config.toml, metrics.jsonl, tensorboard/, checkpoints/, report.html."""
    seed: int = 1234
    """Seed of initial weights and data order."""
    log_every: int = 10
    """Steps between log lines."""
    max_bad_steps: int = 3
    """Consecutive steps with a NaN or infinite loss after which the run saves and stops."""
    stop_after_steps: int = 0
    """Save and stop cleanly after this many steps of this process; 0 = never (tests and the demo use it)."""
    stop_after: str = "never"
    """Save and stop cleanly so that the process has ended after this time ("3h50m", "90s"). Slurm's own limit counts
    too, where SLURM_JOB_END_TIME tells it."""


@dataclass(frozen=True)
class WatchdogConfig:
    """How long a part of the run may take before the watchdog ends it, with the stack of every rank; 0 = no limit.

    engine.timeout_s bounds how long ranks wait for one another in a step, and is the shorter one there. These limits
    hold for a rank by itself, for ranks that are all stuck alike, for rank 0 when it builds an index and the others
    wait, and for a save beside the training.
    """

    start_s: float = 1800.0
    """From the start of the process to the first step (reading the checkpoint, building data indices), and for opening
    the data of each later stage."""
    step_s: float = 3600.0
    """One step; in an evaluation, one row and what comes before the first. Several times the longest step."""
    save_s: float = 1800.0
    """One checkpoint, from its begin to its publication."""


@dataclass(frozen=True)
class RunConfig:
    """The whole tree. `cli` takes it apart once; below it every function receives its own part."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: tuple[StageConfig, ...] = ()
    eval: EvalConfig = field(default_factory=EvalConfig)
    niah: NiahConfig = field(default_factory=NiahConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
