"""A quick forward pass on a CUDA card for models whose layers are Llama's. Ranks on CUDA.

Steps in which every sequence runs one token are replayed from graphs, captured at start for a few
batch sizes and padded to the next of them; others are launched kernel by kernel. A draft counts as
a sequence here: it has its sequence's row and the context that it ends. Before a graph is
trusted its tokens are compared with those of the same step launched kernel by kernel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp_serving.batch import Batch
from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.kernels.cuda.activations import Rounding
from autotp_serving.kernels.cuda.products import can_multiply
from autotp_serving.kernels.triton import attention as triton_attention
from autotp_serving.layers.head import PoolingHead, VocabParallelHead
from autotp_serving.model.batch_state import BatchState
from autotp_serving.model.fused_layers import FAMILIES, Norm
from autotp_serving.model.gpu_layers import GpuLayer, check_sizes
from autotp_serving.model.gpu_mlp import MIXTURE_FAMILIES
from autotp_serving.model.gpu_products import Product, UnfitLayer, join_linears
from autotp_serving.model.gpu_sums import AddNorm, AllReduce, open_inboxes
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.step_inputs import StepInputs
from autotp_serving.progress import Progress

logger = logging.getLogger(__name__)

PROOF_PROMPT, PROOF_TOKENS = 24, 8
"""Tokens of the prompt, and of its completion, that prove the graphs."""


def find_batch_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that graphs are captured for, ascending."""
    step = 8 if max_num_seqs <= 128 else 16
    sizes = {1, 2, 4, 8, *range(step, max_num_seqs, step), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


@dataclass(frozen=True)
class Graph:
    """A captured decode step.

    Attributes:
        logits: [batch size, vocab_size], overwritten by each replay.
    """

    graph: torch.cuda.CUDAGraph
    logits: Tensor


def open_gpu_forward(
    model: nn.Module,
    cache: KVCache,
    state: BatchState,
    config: ServingConfig,
    max_model_len: int,
    all_reduce: AllReduce,
    group: RankGroup,
) -> GpuForward | None:
    """The quick pass, its graphs captured and proved, or None where it does not take the model.

    All ranks must call it.
    """
    if model.config.model_type not in (*FAMILIES, *MIXTURE_FAMILIES):
        return None
    reduce = all_reduce if group.size > 1 else None
    inboxes = open_inboxes(group, model.config.hidden_size, config.max_num_batched_tokens)
    add_norm = AddNorm(reduce, inboxes)
    try:
        forward = GpuForward(model, cache, state, config, max_model_len, add_norm)
        reason = None
    except UnfitLayer as error:
        reason = str(error)
    reason = next(filter(None, group.all_gather(reason)), None)
    if reason is not None:
        if group.rank == 0:
            logger.warning("This model runs transformers' own layers, slowly: %s", reason)
        return None
    if not config.pools:
        forward.warm_up(config.max_num_batched_tokens, max_model_len, config.max_num_seqs)
    if not config.enforce_eager and not config.pools:
        forward.capture(config.max_decode_rows, show_progress=group.rank == 0)
        if not all(group.all_gather(forward.prove(max_model_len))):
            forward.drop_graphs()
            if group.rank == 0:
                logger.warning(
                    "Graphs give other tokens than the same steps launched kernel by kernel on "
                    "this card and driver: they are not used, and decoding is slower"
                )
    return forward


class GpuForward:
    """Runs steps as `PlainForward` does, quicker; made by `open_gpu_forward`."""

    can_draft = True

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        state: BatchState,
        config: ServingConfig,
        max_model_len: int,
        add_norm: AddNorm,
    ) -> None:
        decoder, device = model.model, cache.device
        first = decoder.layers[0].self_attn
        pools = cache.layer(0)
        head_dim, num_kv_heads = first.head_dim, pools.keys.shape[1]
        num_heads = first.q_proj.weight.shape[0] // head_dim
        self._refuse_unfit(model, cache, num_heads, num_kv_heads, head_dim)
        with torch.inference_mode():
            rotary = self._make_rotary(decoder.rotary_emb, max_model_len, device)
            check_sizes(model, head_dim, rotary[0])
            workspace = triton_attention.allocate_workspace(
                config.max_decode_rows,
                num_heads,
                num_kv_heads,
                head_dim,
                cache.block_size,
                cache.is_int8,
                device,
            )
            self._layers = []
            for layer in decoder.layers:
                self._layers.append(GpuLayer.of(layer, cache, rotary, add_norm, workspace))
                torch.cuda.empty_cache()  # the parts of joined weights, none of which fits again
        self._embedding = decoder.embed_tokens
        self._add_norm = add_norm
        self._norm = Norm.of(decoder.norm)
        self._head = model.get_output_embeddings()
        self._head_product = _find_head_product(self._head)
        self._block_size = cache.block_size
        self._cache_len = cache.num_blocks * cache.block_size
        self._vocab_size = self._head.vocab_size
        self._state = state
        num_rows = config.max_decode_rows
        state.reserve(max(config.max_num_batched_tokens, num_rows), num_rows)
        self._graphs: dict[int, Graph] = {}

    def find_padded_size(self, batch: Batch) -> int:
        """See Forward: the next larger size that there is a graph for."""
        if not batch.is_decode:
            return 0
        return next((size for size in self._graphs if size >= batch.num_seqs), 0)

    @torch.inference_mode()
    def __call__(self, inputs: StepInputs) -> Tensor:
        """See Forward. The result may be overwritten by the next step."""
        graph = self._graphs.get(inputs.num_seqs) if inputs.is_padded else None
        if graph is None:
            return self._run(inputs)
        graph.graph.replay()
        if inputs.chosen_rows is None:
            return graph.logits[: len(inputs.host_query_lens)]
        rows = torch.tensor(inputs.chosen_rows, device=graph.logits.device)
        return graph.logits.index_select(0, rows)

    @torch.inference_mode()
    def warm_up(self, max_num_tokens: int, max_model_len: int, max_num_seqs: int) -> None:
        """Run steps with prompts once, so that no request waits for what they compile.

        Prompts of one sequence, of two, and of one beside a token of another.
        """
        max_len = min(max_model_len, self._cache_len)
        num_seqs = min(2, max_num_seqs)
        length = min(max_len, max_num_tokens // num_seqs)
        alone, half = [0] * min(max_len, max_num_tokens), [0] * length
        steps = [[(alone, 0)], [(half, 0)] * num_seqs]
        if num_seqs > 1 and length > 2:
            steps.append([(half[1:], 0), ([0], length - 1)])
        for parts in steps:
            self._launch(self._make_batch(parts))
        torch.cuda.synchronize()

    @torch.inference_mode()
    def capture(self, max_num_seqs: int, show_progress: bool) -> None:
        """Capture graphs of decode steps, the largest first: the others then use its memory."""
        started = time.perf_counter()
        free = torch.cuda.mem_get_info()[0]
        pool = None
        sizes = find_batch_sizes(max_num_seqs)
        graphs = {}
        progress = Progress("Capturing graphs", len(sizes), "batch sizes", is_shown=show_progress)
        for size in sizes[::-1]:
            inputs = self._state.apply(Batch([], [], [], [], []), size)  # padding alone
            self._run(inputs)  # compiles what this size needs
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._run(inputs)
            pool = pool or graph.pool()
            graphs[size] = Graph(graph, logits)
            progress.advance()
        self._graphs = {size: graphs[size] for size in sizes}
        if show_progress:
            logger.info(
                "Graphs of %d batch sizes up to %d: %.1f s, %d MiB",
                len(sizes),
                sizes[-1],
                time.perf_counter() - started,
                max(0, free - torch.cuda.mem_get_info()[0]) >> 20,
            )

    @torch.inference_mode()
    def prove(self, max_model_len: int) -> bool:
        """Whether every graph gives the tokens of the same step launched kernel by kernel.

        Writes to the first blocks of the cache, in which nothing is yet.
        """
        prompt_len = min(PROOF_PROMPT, max_model_len - PROOF_TOKENS)
        if prompt_len < 1:
            return False
        prompt = [(7919 * index + 11) % self._vocab_size for index in range(prompt_len)]
        answers = []
        for launch in (self._launch, self._replay):
            tokens = [_best(launch(self._make_batch([(prompt, 0)])))[0]]
            for index in range(PROOF_TOKENS - 1):
                batch = self._make_batch([([tokens[-1]], prompt_len + index)])
                tokens.append(_best(launch(batch))[0])
            answers.append(tokens)
        for size in self._graphs:
            batch = self._make_batch([([answers[0][0]], prompt_len)] * size)
            answers.append(_best(self._launch(batch)))
            answers.append(_best(self._replay(batch)))
        return all(a == b for a, b in zip(answers[::2], answers[1::2], strict=True))

    def drop_graphs(self) -> None:
        """Launch every step kernel by kernel from now on."""
        self._graphs = {}

    def _launch(self, batch: Batch) -> Tensor:
        """Run a batch without a graph."""
        return self._run(self._state.apply(batch))

    def _replay(self, batch: Batch) -> Tensor:
        """Run a batch as it will be run."""
        return self(self._state.apply(batch, self.find_padded_size(batch)))

    def _make_batch(self, parts: Sequence[tuple[Sequence[int], int]]) -> Batch:
        """A step of (token ids, first position) of sequences that are all in the same row."""
        lens = [len(token_ids) for token_ids, _ in parts]
        starts = [start for _, start in parts]
        end = max(start + num_tokens for start, num_tokens in zip(starts, lens, strict=True))
        table = list(range(-(-end // self._block_size)))
        return Batch(
            rows=[0] * len(parts),
            starts=starts,
            query_lens=lens,
            num_known=lens,
            token_ids=[token_id for token_ids, _ in parts for token_id in token_ids],
            grown=[0],
            first_blocks=[0],
            num_new_blocks=[len(table)],
            new_blocks=table,
            sampled=list(range(len(parts))),
        )

    def _run(self, inputs: StepInputs) -> Tensor:
        """Logits [num_logit_rows, vocab_size] of the step that the buffers hold."""
        hidden = functional.embedding(inputs.token_ids, self._embedding.weight)
        added = None
        for layer in self._layers[:-1]:
            hidden, added = layer.run(hidden, added, inputs)
        last = self._layers[-1]
        if len(inputs.logit_rows) == 0:
            last.store(hidden, added, inputs)
            return hidden.new_empty(0, self._vocab_size)
        # A padded step has logits of all tokens; of a prompt's the last layer runs few.
        rows = None if inputs.is_padded else inputs.logit_rows
        hidden, added = last.run(hidden, added, inputs, rows)
        if self._head_product is None:
            x = self._add_norm(hidden, added, self._norm, Rounding.NONE)
            return self._head(x.plain)
        rounding = self._head_product.rounding(len(hidden))
        x = self._add_norm(hidden, added, self._norm, rounding)
        logits = self._head_product(x)
        if self._head_product.bias is not None:
            logits = logits.add_(self._head_product.bias)
        return self._head.gather(logits)

    @staticmethod
    def _refuse_unfit(
        model: nn.Module, cache: KVCache, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> None:
        if model.dtype != torch.bfloat16:
            raise UnfitLayer(f"its type is {model.dtype}, and the kernels take bfloat16")
        if model.config.hidden_act != "silu":
            raise UnfitLayer(f"its activation is {model.config.hidden_act}")
        if not can_multiply(cache.device.index):
            raise UnfitLayer("the CUDA kernels cannot be used here")
        if not triton_attention.can_attend(
            torch.bfloat16, num_heads, num_kv_heads, head_dim, head_dim, cache.block_size
        ):
            raise UnfitLayer(f"heads of {head_dim}, blocks of {cache.block_size} tokens")

    @staticmethod
    def _make_rotary(
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        max_model_len: int,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [max_model_len, head_dim] bfloat16 of all positions."""
        like = torch.empty(1, dtype=torch.bfloat16, device=device)
        cos, sin = rotary(like, torch.arange(max_model_len, device=device)[None])
        return cos[0].contiguous(), sin[0].contiguous()


def _find_head_product(head: VocabParallelHead | PoolingHead) -> Product | None:
    """The head as a product, of this rank's rows; None for a model that is pooled."""
    if isinstance(head, PoolingHead):
        return None
    if head.low_bit is not None:
        return Product(join_linears(head.low_bit).weight, head.bias)
    if head.weight.dtype != torch.bfloat16:
        raise UnfitLayer("its head is not bfloat16")
    return Product(head.weight.detach(), head.bias)


def _best(logits: Tensor) -> list[int]:
    return logits.argmax(-1).tolist()
