"""Sampling a model the same way every time: fixed conditions, one noise seed a sample, any batch size."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import KernelUnavailable
from ..quantize.errors import InputError, OutputError, reason_of
from ..runtime.checkpoint import read_json
from ..runtime.family import Family, find_family
from ..runtime.source import Source, load_pipeline, load_transformer
from ..runtime.step import StepTracker
from .conditions import Conditions, random_conditions, read_conditions
from .prompts import pick_prompts
from .size import show_size, size_arguments
from .step_watch import Progress, StepWatch, step_progress
from .timesteps import count_tokens, set_timesteps
from .workload import Workload

_NOT_OF_CONDITIONS = (torch.OutOfMemoryError, InputError, KernelUnavailable)


@dataclass
class Samples:
    """images float32 [n, ...] in 0..1 (latents where there is no decoder); trajectory: the denoiser's input latents
    of every sample at each step, float32 [steps][n, ...]; conditions: what was asked for."""

    images: Tensor
    trajectory: list[Tensor] = field(default_factory=list)
    conditions: Any = None


class Sampler:
    """Runs a denoiser through whole sampling runs. `denoiser` is the module that calibration observes."""

    denoiser: nn.Module
    family: Family
    scheduler: Any

    def conditions(self, workload: Workload) -> Any:
        """All conditions of a workload; depends on the model's configuration and the seed only."""
        raise NotImplementedError

    def guidance(self, workload: Workload, conditions: Any) -> float | None:
        """The guidance scale that the workload is sampled with; None: the sampler knows none."""
        raise NotImplementedError

    def sample_batch(self, workload: Workload, conditions: Any, start: int, stop: int, decode: bool = True) -> Tensor:
        """Samples start..stop of the workload: float [stop - start, ...]. Equal calls give equal samples, also where
        pipeline or scheduler draw noise from torch's own generators, whose state is left as it was.

        decode  False: latents will do, where the pipeline can give them
        Raises InputError when the scheduler does not take the workload's steps, or the pipeline not its size;
        OutputError when memory does not hold as many samples at a time.
        """
        try:
            with _seeded(workload.batch_seed(start)):
                return self._sample(workload, conditions, start, stop, decode)
        except torch.OutOfMemoryError as error:
            count = stop - start
            raise OutputError(
                f"no memory to sample {count} at a time ({reason_of(error)}); --batch-size {max(1, count // 4)} and a "
                "smaller --size take less, and calibrate --offload holds one block at a time"
            ) from error

    def _sample(self, workload: Workload, conditions: Any, start: int, stop: int, decode: bool) -> Tensor:
        raise NotImplementedError

    def batches(self, workload: Workload) -> Iterator[tuple[int, int]]:
        for start in range(0, workload.samples, workload.batch_size):
            yield start, min(workload.samples, start + workload.batch_size)

    @torch.no_grad()
    def run(
        self,
        workload: Workload,
        progress: Progress | None = None,
        keep_trajectory: bool = False,
        decode: bool = True,
    ) -> Samples:
        """Samples the workload. `progress` is called with (calls of the denoiser so far, expected calls)."""
        batches = self.run_batches(workload, self.conditions(workload), progress, keep_trajectory, decode)
        return join_samples(list(batches))

    @torch.no_grad()
    def run_batches(
        self, workload: Workload, conditions: Any, progress: Progress | None, keep_trajectory: bool, decode: bool = True
    ) -> Iterator[Samples]:
        """What `run` samples under `conditions`, all of the workload's, batch by batch: all may be more than memory."""
        spans = list(self.batches(workload))
        with StepTracker(self.denoiser, self.family) as tracker:
            for number, (start, stop) in enumerate(spans):
                tracker.reset()
                watch = StepWatch(tracker, stop - start, keep_trajectory)
                if progress is not None:
                    watch.on_step = step_progress(progress, number, len(spans), workload.steps)
                handle = self.denoiser.register_forward_pre_hook(watch)
                try:
                    images = self.sample_batch(workload, conditions, start, stop, decode).float().cpu()
                finally:
                    handle.remove()
                yield Samples(images, watch.latents, conditions)


def join_samples(batches: list[Samples]) -> Samples:
    """Batches of one workload as one, its images and latents contiguous."""
    steps = [torch.cat(parts) for parts in zip(*(batch.trajectory for batch in batches), strict=True)]
    return Samples(torch.cat([batch.images for batch in batches]).contiguous(), steps, batches[0].conditions)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's own generators start from `seed` in the block, and go on after it as if it had not been."""
    on_gpu = torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else (), device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed_all(seed)
        yield


class PipelineSampler(Sampler):
    """Samples with a diffusers pipeline: class labels, or prompts."""

    def __init__(self, pipe: Any, component: str = "transformer") -> None:
        self.pipe = pipe
        self.denoiser, self.scheduler = getattr(pipe, component), pipe.scheduler
        self.family = find_family(self.denoiser)
        self.accepts = inspect.signature(pipe.__call__).parameters
        if "prompt" in self.accepts and hasattr(getattr(pipe, "vae", None), "enable_slicing"):
            pipe.vae.enable_slicing()  # large pictures are decoded one by one: all at once take more than the denoiser

    def conditions(self, workload: Workload) -> dict[str, list[Any]]:
        if workload.conditions is not None:
            raise InputError(
                f"{workload.conditions}: a conditions file is for a bare transformer, not for a whole pipeline "
                f"({type(self.pipe).__name__}); name its transformer folder, or leave --conditions out"
            )
        if workload.prompts is not None and "prompt" not in self.accepts:
            raise InputError(f"--prompts {workload.prompts}: {type(self.pipe).__name__} takes no prompt")
        if "class_labels" in self.accepts:
            generator = torch.Generator().manual_seed(workload.seed)
            labels = self.family.conditions(self.denoiser, workload.samples, generator)["class_labels"]
            return {"class_labels": labels.tolist()}
        if "prompt" in self.accepts:
            return {"prompt": pick_prompts(workload.prompts, workload.samples, workload.seed, workload.learn)}
        raise InputError(f"{type(self.pipe).__name__} takes neither class_labels nor prompt; give your own data")

    def guidance(self, workload: Workload, conditions: Any) -> float | None:
        parameter = self.accepts.get("guidance_scale")
        default = None if parameter is None else parameter.default
        own = float(default) if isinstance(default, int | float) else None
        return own if workload.guidance_scale is None else workload.guidance_scale

    def _sample(self, workload: Workload, conditions: Any, start: int, stop: int, decode: bool) -> Tensor:
        set_timesteps(self.scheduler, workload.steps)  # the pipeline does it again; a wrong number is an error here
        options = {"guidance_scale": workload.guidance_scale} if workload.guidance_scale is not None else {}
        size = size_arguments(workload.size, self.accepts, type(self.pipe).__name__)
        try:
            out = self.pipe(
                **{name: values[start:stop] for name, values in conditions.items()},
                generator=workload.generators(start, stop),
                num_inference_steps=workload.steps,
                output_type="pt" if decode or "prompt" not in self.accepts else "latent",
                **options,
                **size,
            )
        except ValueError as error:
            if workload.size is None:
                raise
            shown, kind = show_size(workload.size), type(self.pipe).__name__
            raise InputError(f"--size {shown}: {kind} does not take it: {reason_of(error)}") from error
        return out.images if hasattr(out, "images") else out.frames


class DenoiserSampler(Sampler):
    """Samples latents with a bare denoiser and a diffusers scheduler; conditions from a file or the family."""

    default_guidance = 1.5

    def __init__(self, denoiser: nn.Module, scheduler: Any) -> None:
        self.denoiser, self.scheduler = denoiser, scheduler
        self.family = find_family(denoiser)

    def conditions(self, workload: Workload) -> Conditions:
        if workload.size is not None or workload.prompts is not None:
            raise InputError(
                "--size and --prompts are for a pipeline; a bare transformer samples what its conditions file says"
            )
        count, seed = workload.samples, workload.seed
        if workload.conditions is None:
            return random_conditions(self.denoiser, self.family, count, seed)
        found = read_conditions(workload.conditions, self.denoiser, self.family, count, seed)
        if found.unguided is None and workload.guidance_scale not in (None, 1.0):
            raise InputError(
                f"{workload.conditions}: no uncond.* tensors; guidance {workload.guidance_scale} needs them"
            )
        return found

    def guidance(self, workload: Workload, conditions: Conditions) -> float:
        if conditions.unguided is None:
            return 1.0
        return self.default_guidance if workload.guidance_scale is None else workload.guidance_scale

    def _sample(self, workload: Workload, conditions: Conditions, start: int, stop: int, decode: bool) -> Tensor:
        model: Any = self.denoiser
        device, dtype = model.device, model.dtype
        scale = self.guidance(workload, conditions)
        branches = [conditions.guided] if conditions.unguided is None else [conditions.unguided, conditions.guided]
        arguments = self.family.for_batch(
            {
                name: torch.cat([branch[name][start:stop] for branch in branches]).to(
                    device, dtype if tensor.is_floating_point() else None
                )
                for name, tensor in conditions.guided.items()
            }
        )
        generators = workload.generators(start, stop)
        noise = [torch.randn(conditions.latent_shape, generator=g) for g in generators]
        # a sample's generator goes on after its first noise, so that later noise is the sample's own as well
        drawn = {"generator": generators} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        tokens = count_tokens(conditions.latent_shape, model)
        set_timesteps(self.scheduler, workload.steps, tokens, self.family.sigmas(workload.steps))
        latents = torch.stack(noise).to(device)  # float32 between calls: sixteen bits would lose small steps
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for number, t in enumerate(self.scheduler.timesteps):
            batch = torch.cat([latents] * len(branches))
            batch = (
                self.scheduler.scale_model_input(batch, t) if hasattr(self.scheduler, "scale_model_input") else batch
            )
            time = t if self.family.timestep_scale == 1 else t * self.family.timestep_scale
            time = time.to(device).expand(len(batch))
            try:
                out = self.denoiser(batch.to(dtype), timestep=time, **arguments, return_dict=False)[0]
            except (RuntimeError, TypeError, ValueError) as error:
                if number or workload.conditions is None or isinstance(error, _NOT_OF_CONDITIONS):
                    raise
                raise InputError(
                    f"{workload.conditions}: {type(model).__name__} cannot be called with these conditions "
                    f"({reason_of(error)})"
                ) from error
            # a model that predicts its variance as well gives twice the channels
            parts = out[:, : conditions.latent_shape[0]].float().chunk(len(branches))
            guided = parts[-1] if len(parts) == 1 else parts[0] + scale * (parts[1] - parts[0])
            latents = self.scheduler.step(guided, t, latents, **drawn, return_dict=False)[0]
        return latents


def make_sampler(
    source: Source, dtype: torch.dtype, device: torch.device | str, substitute: Source | None = None
) -> Sampler:
    """The sampler of a model on disk: its pipeline, or for a bare transformer its denoiser with the scheduler that lies
    in or next to its folder. Where there is none it is that of `substitute`, or else a linear-beta DDIM."""
    if source.is_pipeline:
        return PipelineSampler(load_pipeline(source, dtype, device), source.component)
    owner = source if source.scheduler is not None or substitute is None else substitute
    return DenoiserSampler(load_transformer(source, dtype, device), load_scheduler(owner))


def load_scheduler(source: Source) -> Any:
    """The diffusers scheduler that a source is sampled with. Raises InputError when its class is unknown or steps in a
    way of its own, and when there is none and the family's models are no plain diffusions."""
    import diffusers

    folder = source.scheduler
    if folder is None:
        if (family := find_family(source.skeleton())).diffusion:
            return diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
        raise InputError(
            f"{source.label}: no scheduler/ in it or next to it, which says how a model of the family '{family.name}' "
            "is sampled; copy that of its pipeline there"
        )
    path = folder / "scheduler_config.json"
    name = str(read_json(path).get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None or not issubclass(kind, diffusers.SchedulerMixin):
        raise InputError(f"{path}: diffusers {diffusers.__version__} has no scheduler '{name}'")
    if list(inspect.signature(kind.step).parameters)[1:4] != ["model_output", "timestep", "sample"]:
        raise InputError(f"{path}: {name} steps in a way of its own; name the whole pipeline, or put another there")
    return kind.from_pretrained(folder)
