"""vLLM in this process: continuous batching, a prefix cache over turns and samples, weights that can be swapped."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from mtpo.engines.checks import checked_generation, tokens_to_sample
from mtpo.engines.mixture import Mixture
from mtpo.engines.routing import Router
from mtpo.errors import EngineError, InputError
from mtpo.rollout import Generation, Sampling

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXACT_ARGS: dict[str, Any] = {
    "skip_tokenizer_init": True,  # ids in, ids out
    "generation_config": "vllm",  # else the checkpoint's generation_config.json changes temperature and top-p
    "logprobs_mode": "raw_logprobs",
}
"""Engine arguments that what we return depends on; they cannot be overridden."""

DEFAULT_ARGS: dict[str, Any] = {
    "enable_prefix_caching": True,
    "prefix_cache_retention_interval": None,  # 0, the default, forgets sampled ids in sliding-window layers
    "disable_log_stats": True,
}
CPU_ARGS: dict[str, Any] = {
    "block_size": 32,  # the default, 128, shares no short prompt
    "enable_chunked_prefill": False,  # vLLM 0.32 dies of a seeded request whose prompt is cut (Generator.get_offset)
}
NO_MIXTURE = (
    "vLLM cannot sample from a mixture: what its logits processors change is in none of the raw log-probs that it "
    "returns, log Z has no way out of its processes, and the second model would have no place in its cache of keys "
    "and values; use the embedded engine"
)
"""As of vLLM 0.32: `vllm/v1/sample/sampler.py` takes raw log-probs before its processors run, and processed ones only
after temperature and truncation; the processors of its two model runners also have two incompatible interfaces."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as `max_lora_rank`."""


class VLLMEngine:
    """An `Engine` over vLLM's `AsyncLLM`.

    vLLM computes in processes of its own and is spoken to from a thread of its own, so its bookkeeping does not
    hold up the rollout, and the engine may be used from any event loop. If those processes die, they are
    started again and the requests that they held are asked once more.

    Args:
        model: a folder written by `save_pretrained`, or a name on the hub.
        adapter: a folder written by peft, served on top of the model.
        engine_args: fields of vLLM's `AsyncEngineArgs`: dtype, tensor_parallel_size, data_parallel_size,
            gpu_memory_utilization, max_model_len, max_num_seqs, block_size, ...

    Raises:
        InputError: vLLM is not installed, or refuses the model, the adapter or an engine argument; or the model is a
            `Mixture`, which vLLM cannot hold.
    """

    def __init__(
        self, model: str | Path | Mixture, *, adapter: str | Path | None = None, **engine_args: Any
    ) -> None:
        if isinstance(model, Mixture):
            raise InputError(NO_MIXTURE)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            import vllm  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(f"this engine needs vLLM, pip install 'mtpo[vllm]': {error}") from error
        if clash := sorted(EXACT_ARGS.keys() & engine_args.keys()):
            raise InputError(
                f"{', '.join(clash)}: log-probs and ids are only right with the engine's own value"
            )
        self._model = str(model)
        self._adapter = None if adapter is None else Path(adapter)
        self._engine_args = {**DEFAULT_ARGS, **engine_args}
        if self._adapter is not None:
            lora_args = {"enable_lora": True, "max_lora_rank": _rank(self._adapter)}
            self._engine_args = lora_args | self._engine_args
        self._router = Router(engine_args.get("data_parallel_size", 1))
        self._request_numbers = itertools.count()
        self._num_starts = 0
        self._llm: Any = None
        self._lora: Any = None
        self._lora_numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._changing = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
            self.fingerprint = _fingerprint(self._model, self._adapter)
        except BaseException:
            self._stop_thread()
            raise
        self.max_context: int = self._llm.model_config.max_model_len
        self._vocab_size: int = self._llm.model_config.get_vocab_size()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        prompt = list(prompt_ids)
        num_asked = tokens_to_sample(prompt, sampling, self.max_context)
        if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:  # vLLM would die of it
            raise InputError(
                f"the prompt holds ids from {min(prompt)} to {max(prompt)}; the model knows 0 to "
                f"{self._vocab_size - 1}"
            )
        return await self._in_thread(self._generate(prompt, sampling, num_asked, session))

    async def update_weights(self, folder: str | Path) -> None:
        """Serve the weights of `folder` from now on, and forget all that was computed with the old ones.

        Weights of the same names and shapes are loaded in place; otherwise vLLM is started again. If the new ones
        cannot be used, the engine goes on with those that it had.

        Args:
            folder: a checkpoint; or an adapter, for an engine that was made with one.

        Raises:
            InputError: there is no model and no adapter in `folder`, or it cannot be read, or vLLM refuses it.
            EngineError: a request is in flight, which would be answered by two policies; or vLLM does not start
                with the new weights.
        """
        await self._in_thread(self._update(Path(folder)))

    def release(self, session: str) -> None:
        """Only the routing forgets the session: vLLM evicts what has not been used for longest."""
        self._router.release(session)

    async def aclose(self) -> None:
        """Stop vLLM. Calls that are in flight are cancelled; closing twice is fine."""
        if self._thread.is_alive():
            await self._in_thread(self._shut_down())
            self._stop_thread()

    # -- in vLLM's thread ------------------------------------------------------------------------------------

    async def _start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        device_args = CPU_ARGS if current_platform.is_cpu() else {}
        try:
            args = AsyncEngineArgs(**{"model": self._model, **device_args, **self._engine_args, **EXACT_ARGS})
            llm = AsyncLLM.from_engine_args(args)
        except (TypeError, ValueError, OSError) as error:
            raise InputError(f"vLLM refuses {self._model}: {_first_line(error)}") from error
        except RuntimeError as error:
            raise EngineError(f"vLLM did not start: {_first_line(error)}") from error
        if self._adapter is not None:
            self._lora = await self._loaded(llm, self._adapter)
        self._llm = llm
        self._num_starts += 1

    async def _generate(
        self, prompt: list[int], sampling: Sampling, num_asked: int, session: str
    ) -> Generation:
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

        for can_retry in (True, False):
            async with self._changing:
                start = self._num_starts
            try:
                with self._router.route(session, range(len(self._router.in_flight))) as rank:
                    return await self._sample(prompt, sampling, num_asked, rank)
            except EngineDeadError as error:
                if not can_retry:
                    raise EngineError("vLLM died twice over one request") from error
                async with self._changing:
                    if self._num_starts == start:  # nobody else has seen to it
                        await self._restart()
        raise AssertionError("unreachable: the second round returns or raises")

    async def _sample(self, prompt: list[int], sampling: Sampling, num_asked: int, rank: int) -> Generation:
        from vllm.inputs import tokens_input  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # pyright: ignore

        if self._llm is None:  # an earlier start failed, or was cancelled
            raise EngineDeadError
        answers = self._llm.generate(
            tokens_input(prompt),
            _sampling_params(sampling, num_asked),
            request_id=str(next(self._request_numbers)),
            lora_request=self._lora,
            data_parallel_rank=rank if len(self._router.in_flight) > 1 else None,
        )
        try:
            [answer] = [answer async for answer in answers]
        except EngineGenerateError as error:
            raise EngineError(f"vLLM: {_first_line(error.__cause__ or error)}") from error
        [completion] = answer.outputs
        ids, found = list(completion.token_ids), completion.logprobs
        if completion.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended the request with {completion.finish_reason!r}")
        # Each position lists the sampled token first.
        logps = [found.logprobs[start] for start in found.start_indices]
        return checked_generation(ids, logps, sampling.stop_ids, num_asked)

    async def _update(self, folder: Path) -> None:
        async with self._changing:
            if num_running := sum(self._router.in_flight):
                raise EngineError(f"weights cannot change while {num_running} requests are in flight")
            if (folder / "adapter_config.json").exists():
                await self._change_adapter(folder)
            elif (folder / "config.json").exists():
                await self._change_model(folder)
            else:
                raise InputError(f"{folder}: expected config.json or adapter_config.json")
            if not await self._llm.reset_prefix_cache():  # it holds values of the old weights
                await self._restart()
            self.fingerprint = _fingerprint(self._model, self._adapter)

    async def _change_adapter(self, folder: Path) -> None:
        if self._adapter is None:
            raise InputError(f"{folder} is an adapter, but this engine was made without one")
        old, self._lora = self._lora, await self._loaded(self._llm, folder)
        self._adapter = folder
        await self._llm.remove_lora(old.lora_int_id)

    async def _loaded(self, llm: Any, adapter: Path) -> Any:
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        number = next(self._lora_numbers)
        lora = LoRARequest(f"adapter-{number}", number, str(adapter.resolve()))
        try:
            await llm.add_lora(lora)
        except Exception as error:  # whatever its worker raised, as text
            raise InputError(f"vLLM refuses the adapter {adapter}: {_first_line(error)}") from error
        return lora

    async def _change_model(self, folder: Path) -> None:
        fits = _shapes(folder) == _shapes(_local_folder(self._model))
        if fits:
            try:
                await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                self._model = str(folder)
                return
            except (
                Exception
            ) as error:  # whatever its worker raised, as text; some weights may be the new ones
                logger.warning("vLLM could not load %s in place: %s", folder, _first_line(error))
        old, self._model = self._model, str(folder)
        try:
            await self._restart()
        except (InputError, EngineError):
            self._model = old  # the next request starts vLLM with it
            raise

    async def _restart(self) -> None:
        logger.warning("starting vLLM again with %s", self._model)
        if self._llm is not None:
            self._llm.shutdown()
        self._llm = self._lora = None
        await self._start()

    async def _shut_down(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None  # its __del__ fails in an interpreter that is being torn down

    # -- between the threads ---------------------------------------------------------------------------------

    async def _in_thread(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():
            work.close()
            raise EngineError("the engine is closed")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _stop_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _sampling_params(sampling: Sampling, num_asked: int) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams  # pyright: ignore

    return SamplingParams(
        max_tokens=num_asked,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # the stop ids say where a turn ends, not the checkpoint
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _rank(adapter: Path) -> int:
    try:
        rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
        return next(allowed for allowed in LORA_RANKS if allowed >= rank)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(
            f"{adapter / 'adapter_config.json'}: expected an adapter of rank up to {LORA_RANKS[-1]}"
        ) from error


def _local_folder(model: str) -> Path:
    """The folder of a checkpoint that vLLM has loaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: expected weights: {_first_line(error)}") from error
    return shapes


def _fingerprint(model: str, adapter: Path | None) -> str:
    """SHA-256 of the weight files, 64 hex digits; about a second per GB."""
    folders = [_local_folder(model)] + ([adapter] if adapter else [])
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
