"""`Explainer`: an attribution method with or without ParchGrad, on batches of any size."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from parchgrad._io.checks import check_whole_number
from parchgrad.core.edit import DEFAULT_SELECTOR, Edit
from parchgrad.core.engine import ParchGrad, partitioned_before
from parchgrad.core.layers import LayerChoice, bare_model, check_evaluation_mode
from parchgrad.core.partition import Conserve
from parchgrad.core.selectors import Selector
from parchgrad.core.targets import Target, check_logits, check_target_count, integer_targets
from parchgrad.errors import InputError, ModelError, ModelWarning, NonFiniteError, SettingError, TargetError, warn
from parchgrad.explain.heatmap import channel_dim_of, heatmap
from parchgrad.explain.methods import find_method, is_detached
from parchgrad.explain.nonfinite import check_running_statistics, find_non_finite
from parchgrad.explain.outputs import Inputs, Logits, Output, Score, Scores, check_images, check_inputs, name_of
from parchgrad.explain.stability import cosine, noisy_copies

__all__ = ["Explainer"]


class Explainer:
    """An attribution method with a partitioned or a plain gradient.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
        >>> explainer = Explainer(model, pg.GradientEnergy(quantile=0.25), layers="all")
        >>> attribution = explainer.attribute(torch.rand(2, 3, 8, 8), target=torch.tensor([0, 3]))
        >>> attribution.shape, heatmap(attribution).shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 8, 8]))
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector | None = DEFAULT_SELECTOR,
        *,
        layers: LayerChoice | None = None,
        gamma: float = math.inf,
        conserve: Conserve | None = None,
        gates: float | None = None,
        antialias: bool | None = None,
        balance: bool | None = None,
        method: str = "gradient",
        logits: Callable[[Any], Tensor] | None = None,
        internal_batch_size: int | None = 32,
        **method_options: Any,
    ) -> None:
        """Check every setting against the model and the method.

        Args:
            model: a classifier that returns logits (B, K), in evaluation mode. A DistributedDataParallel wrapper is
                removed.
            selector: rates how much each channel matters; None leaves all channels unchanged, ignores `layers`, `gamma`
                and `conserve`, and without `gates`, `antialias` and `balance` is the plain method.
            layers: layers to edit; see `choose_layers`. Here and below, None means the selector's default.
            gamma: strength of the kept signal relative to the rest, in (0, inf]; infinity prunes the rest.
            conserve: what each layer conserves: `"energy"`, `"independent"`, `"exact"` or `"none"`; see
                `partition_gradient`.
            gates: width of the soft gates of all rectifiers and of max pooling's ramps, in standard deviations of the
                input; 0 is the true derivative. Off for the methods that replace the backward pass of rectifiers:
                `DeepLift`, `DeepLiftShap`, `GuidedBackprop`, `GuidedGradCam` and `Deconvolution`.
            antialias: whether to smooth the gradient at the input of strided convolutions and pooling.
            balance: whether to hold constant, on the way back, what makes transformers and gated networks nonlinear:
                attention weights, denominators of normalisations, gates, and f(x) / x of smooth activations.
            method: `"gradient"`, `"input_x_gradient"`, `"integrated_gradients"`, `"smoothgrad"`, or the class name of
                any Captum gradient attribution that explains the input, such as `"DeepLift"`.
            logits: extracts the logits from an output of any type, such as `lambda output: output["logits"]`; None
                finds them in outputs of usual types, see `find_logits`.
            internal_batch_size: maximum number of rows per pass, at least 1; bounds memory for large batches and for
                methods that expand a row into many (`DeepLiftShap` and `GradientShap` use at least the rows of one
                image). None uses a single pass.
            **method_options: options of the method. `integrated_gradients`: Captum's, among them `n_steps=25` and
                `baselines=0`. `smoothgrad`: `samples=25`, `sigma=0.15` (share of each input's range) and `seed=0`.
                Captum methods: the arguments of the class and of its `attribute`; `GradientShap` uses the global random
                generators of torch and numpy, so its maps differ between calls.

        Raises:
            SettingError: if a setting is out of range, or the method or one of its options does not exist.
            LayerError: if the layers are not in the model.
            ModelError: if the model is wrapped in DataParallel, has neither convolutions nor linear layers, or has no
                module that the method acts on.
            StatisticsError: if the selector's statistics do not fit the layers.
        """
        model = bare_model(model)
        if internal_batch_size is not None:
            check_whole_number("internal_batch_size", internal_batch_size, 1)
        check_logits(logits)
        self._model = model
        self._pick_logits = logits
        self._internal_batch_size = internal_batch_size
        self._method = find_method(method, method_options)
        self._method.check(model)
        if self._method.replaces_rectifiers:
            if gates:
                raise SettingError(
                    f"`gates` is {gates}, but the method {self._method.name!r} replaces the backward pass of "
                    "rectifiers, so they would have no effect. Leave `gates` out, or choose another method."
                )
            gates = 0.0
        self._partition = ParchGrad(
            model,
            selector,
            layers=layers,
            gamma=gamma,
            conserve=conserve,
            gates=gates,
            antialias=antialias,
            balance=balance,
        )

    @classmethod
    def from_edit(
        cls,
        model: nn.Module,
        edit: Edit,
        *,
        method: str = "gradient",
        logits: Callable[[Any], Tensor] | None = None,
        internal_batch_size: int | None = 32,
        **method_options: Any,
    ) -> "Explainer":
        """Create an explainer from an `Edit` (see `Explainer`).

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)).eval()
            >>> Explainer.from_edit(model, Edit(selector=None), method="input_x_gradient")
            Explainer(Sequential, input_x_gradient, plain)
        """
        return cls(
            model,
            edit.selector,
            layers=edit.layers,
            gamma=edit.gamma,
            conserve=edit.conserve,
            gates=edit.gates,
            antialias=edit.antialias,
            balance=edit.balance,
            method=method,
            logits=logits,
            internal_batch_size=internal_batch_size,
            **method_options,
        )

    def __repr__(self) -> str:
        """Show the model, the method and the edit."""
        layers = f"{len(self.layers)} layers" if isinstance(self.layers, tuple) else f"layers={self.layers!r}"
        edit = "plain" if self.edit.is_plain else f"{self.edit.selector!r}, {layers}"
        return f"{type(self).__name__}({type(self._model).__name__}, {self._method.name}, {edit})"

    @property
    def layers(self) -> tuple[str, ...] | float | str:
        """The layers: before the first map as asked for, afterwards `edited_layers`; see `ParchGrad.layers`."""
        return self._partition.layers

    @property
    def edited_layers(self) -> tuple[str, ...]:
        """Names of the layers edited in the last map, in module order; empty before that, and for the plain method."""
        return self._partition.edited_layers

    @property
    def edit(self) -> Edit:
        """The settings, with every None replaced by the selector's default."""
        return self._partition.edit

    @property
    def method_options(self) -> dict[str, Any]:
        """Options of the method, including this package's defaults."""
        return dict(self._method.options)

    @overload
    def attribute(self, inputs: Tensor, target: Target | Score | Sequence[Score] | None = None) -> Tensor: ...

    @overload
    def attribute(self, inputs: tuple[Tensor, ...], target: Target | Score | None = None) -> tuple[Tensor, ...]: ...

    @overload
    def attribute(
        self, inputs: list[Tensor], target: Target | Score | Sequence[Score] | None = None
    ) -> list[Tensor]: ...

    def attribute(
        self, inputs: Inputs | list[Tensor], target: Target | Score | Sequence[Score] | None = None
    ) -> Inputs | list[Tensor]:
        """Attribute the score of a class to the inputs. A row's map does not depend on its batch.

        Args:
            inputs: preprocessed batch, shape (B, C, *S), floating point, finite. For a model with several inputs, which
                is called as `model(*inputs)`: a tuple of such batches, all with B rows, some of which may have the
                shape (B, F). For images of different sizes, such as a detector takes: a list of tensors (C, *S), which
                are explained one by one.
            target: class index for all rows, one per row of shape (B,), or None for the predicted class. For other
                outputs than one logit per class: a score, such as `Contrast` or `BoxScore`, or any function of the
                output, or of what `logits` extracts, that returns a score per row. Methods that use several versions of
                an image call it with more rows than images. For a batch or a list of images, also a list of scores.

        Returns:
            Attribution of the shape, dtype and device of `inputs`, detached; signed, unless the Captum class
            returns magnitudes, as `Saliency` does. For a tuple or list, the same with one attribution per entry.

        Raises:
            InputError: if the inputs are not finite floating-point batches, or do not fit the model.
            SettingError: if the method or its options do not fit the inputs.
            TargetError: if a target is not a class of the model, or there is not one target or score per row.
            StatisticsError: if the selector's statistics do not cover a target.
            ModelError: if the model is in training mode, does not return logits of shape (B, K), does not call the
                chosen layers, or ignores an input.
            NonFiniteError: if scores or maps are NaN or infinite; the message names the layer where that began.
        """
        check_evaluation_mode(self._model)
        if isinstance(inputs, list):
            check_images(inputs, self._model)
            targets = _scores_per_image(target, len(inputs))
            return [
                self._attribute((image.unsqueeze(0),), targets[place], place)[0][0]
                for place, image in enumerate(inputs)
            ]
        if isinstance(target, list | tuple) and any(callable(each) for each in target):
            if isinstance(inputs, tuple):
                raise TargetError("A list of scores needs a batch or a list of images, not a tuple. Pass list(inputs).")
            return torch.stack(self.attribute(list(inputs), target))
        found = self._attribute(check_inputs(inputs), target)
        return found if isinstance(inputs, tuple) else found[0]

    def _attribute(self, tensors: tuple[Tensor, ...], target: Any, first: int = 0) -> tuple[Tensor, ...]:
        """Attribute the score of a batch whose first row has the number `first` in a warning."""
        check_running_statistics(self._model)
        self._method.check_batch(tensors)
        with torch.inference_mode(False), torch.enable_grad():
            batch = tuple(each.detach().clone() for each in tensors)
            images = len(batch[0])
            scores: Logits | Scores
            if callable(target):
                targets, scores = None, Scores(Output(self._model, self._pick_logits), target)
            else:
                targets = self.predict(batch) if target is None else _targets_per_row(target, batch[0])
                scores = Logits(self._model, int(targets.max()), self._pick_logits)
                if self.edit.selector is not None:
                    self.edit.selector.check_targets(sorted(set(targets.tolist())))
            size = self._method.images_per_pass(images, self._internal_batch_size)
            parts = []
            with partitioned_before(scores.output, self._partition):
                for start in range(0, images, size):
                    rows = slice(start, start + size)
                    part = tuple(each[rows].requires_grad_() for each in batch)
                    of_part = None if targets is None else targets[rows]
                    with _told_if_independent(scores, part):
                        parts.append(self._method(scores, part, of_part, rows, self._internal_batch_size))
            found = tuple(torch.cat(maps).detach() for maps in zip(*parts, strict=True))
            finite = torch.stack([maps.flatten(1).isfinite().all(dim=1) for maps in found])
            if not (scores.output.was_finite and bool(finite.all())):
                raise self._non_finite(scores, batch, targets, size, finite)
            if isinstance(scores, Scores):
                _warn_of_zero_maps(scores, batch, found, first)
        return found

    def _non_finite(
        self, scores: Logits | Scores, batch: tuple[Tensor, ...], targets: Tensor | None, size: int, finite: Tensor
    ) -> NonFiniteError:
        """Locate where values stop being finite, in the first row whose map does; `finite` has shape (inputs, B)."""
        images = len(batch[0])
        row = int(finite.all(dim=0).byte().argmin())
        of_input = "" if len(batch) == 1 else f"`{name_of(int(finite[:, row].byte().argmin()), batch)}` in "
        what = f"The map of {of_input}row {row} of {images} contains"
        if bool(finite.all()):
            # The maps are finite, so some score is not.
            with torch.no_grad():
                rows = torch.cat([scores.broken_rows(*part) for part in _split(batch, size)])
            row = int(rows.byte().argmax())
            whose = f"row {row} of {images}" if bool(rows.any()) else self._method.name
            what = f"The scores of {whose} contain"
        # The user's function may expect the same rows as before.
        inputs = _split(batch, size)[row // size] if targets is None else _split(batch, 1)[row]

        def explained(*part: Tensor) -> Tensor:
            found: Tensor = scores(*part)
            return found.sum() if targets is None else found[:, targets[row]].sum()

        with partitioned_before(scores.output, self._partition):
            place = find_non_finite(self._model, explained, *inputs)
        if place is None:
            return NonFiniteError(
                f"{what} NaN or infinite values, which began in the passes of {self._method.name} on modified images, "
                "not on the image itself. Check the method's options, such as its baselines."
            )
        return NonFiniteError(
            f"{what} NaN or infinite values, which began {place}. Check the weights and the range of values there, "
            "or use a wider type such as float64."
        )

    @overload
    def stability(
        self,
        inputs: Tensor,
        target: Target | Score | None = None,
        *,
        noise: float = 0.001,
        draws: int = 4,
        seed: int = 0,
    ) -> Tensor: ...

    @overload
    def stability(
        self,
        inputs: tuple[Tensor, ...],
        target: Target | Score | None = None,
        *,
        noise: float = 0.001,
        draws: int = 4,
        seed: int = 0,
    ) -> tuple[Tensor, ...]: ...

    def stability(
        self,
        inputs: Inputs,
        target: Target | Score | None = None,
        *,
        noise: float = 0.001,
        draws: int = 4,
        seed: int = 0,
    ) -> Inputs:
        """Measure how stable the heat maps are under Gaussian noise on the inputs.

        The explained class is that of the inputs without noise. Near 1 the maps look the same; below 0.5 invisible
        noise gives a different map, which explains little.

        Args:
            inputs: preprocessed batch, shape (B, C, *S), floating point, finite, or a tuple; see `attribute`. All
                inputs of a tuple get noise at once.
            target: see `attribute`.
            noise: standard deviation of the noise, as a share of the range of each row of each input.
            draws: number of noisy copies, at least 1.
            seed: random seed of the noise, which is the same for every row.

        Returns:
            Mean cosine between the heat map of each row and those of its noisy copies, in [0, 1], shape (B,), float64;
            NaN where a map is zero everywhere. For a tuple, a tuple with the stability of each input's map; the map of
            an input (B, F) is the magnitude of its attribution. An input of five dimensions is a clip
            (B, T, C, H, W) if dimension 2 has size 1 or 3 and dimension 1 does not; its map keeps all frames.

        Raises:
            SettingError: if `noise` or `draws` is out of range.
            ParchGradError: see `attribute`.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)).eval()
            >>> Explainer(model, None).stability(torch.rand(1, 3, 8, 8), target=2).round(decimals=6)
            tensor([1.], dtype=torch.float64)
        """
        if isinstance(inputs, list):
            raise InputError(
                "`inputs` is a list of images. Measure one at a time, as in stability(image.unsqueeze(0))."
            )
        tensors = check_inputs(inputs)
        if target is None:
            target = self.predict(tensors)
        clean = self.attribute(tensors, target)
        copies = [
            noisy_copies(each.detach(), noise=noise, draws=draws, seed=seed, index=index)
            for index, each in enumerate(tensors)
        ]
        cosines = []
        for copy in zip(*copies, strict=True):
            pairs = zip(clean, self.attribute(copy, target), strict=True)
            cosines.append([cosine(_magnitude(one), _magnitude(other)) for one, other in pairs])
        found = tuple(torch.stack(of_input).mean(dim=0) for of_input in zip(*cosines, strict=True))
        return found if isinstance(inputs, tuple) else found[0]

    def predict(self, inputs: Inputs) -> Tensor:
        """Predict the class of each row, shape (B,); see `attribute` for the inputs.

        Raises:
            InputError: if the inputs are not finite floating-point batches, or do not fit the model.
            ModelError: if the model is in training mode, or does not return logits of shape (B, K).
            NonFiniteError: if logits are NaN or infinite; the message names the layer where that began.
        """
        check_evaluation_mode(self._model)
        tensors = check_inputs(inputs)
        logits = Logits(self._model, None, self._pick_logits)
        size = self._internal_batch_size or len(tensors[0])
        with torch.no_grad():
            predicted = torch.cat([logits(*part).argmax(dim=1) for part in _split(tensors, size)])
        if not logits.was_finite:
            finite = torch.ones(len(tensors), len(predicted), dtype=torch.bool)
            raise self._non_finite(logits, tensors, predicted, size, finite)
        return predicted


def _split(inputs: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    """Split all inputs into the same rows."""
    return list(zip(*(torch.split(each, size) for each in inputs), strict=True))


def _magnitude(attribution: Tensor) -> Tensor:
    if attribution.dim() < 3:
        return attribution.abs()
    return heatmap(attribution, channel_dim=channel_dim_of(attribution))


@contextmanager
def _told_if_independent(scores: Logits | Scores, inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Explain autograd's error when the score does not depend on an input."""
    try:
        yield
    except RuntimeError as error:
        if not is_detached(error):
            raise
        found = scores(*inputs)
        gradients = torch.autograd.grad(found.sum(), inputs, allow_unused=True) if found.requires_grad else ()
        unused = [name_of(index, inputs) for index, gradient in enumerate(gradients) if gradient is None]
        if 0 < len(unused) < len(inputs):
            raise ModelError(
                f"The score does not depend on `{unused[0]}`. Leave it out of the tuple and fix it in a wrapper of the "
                "model, or look for detach() in the model."
            ) from error
        if isinstance(scores, Scores):
            raise TargetError(
                "The score that `target` returns does not depend on the inputs. Compute it from the output."
            ) from error
        raise ModelError(
            "The logits do not depend on the inputs. Look for detach(), torch.no_grad() or a constant in the model."
        ) from error


def _scores_per_image(target: Any, count: int) -> Sequence[Any]:
    """Return one target for each image of a list."""
    if target is None or callable(target):
        return [target] * count
    if isinstance(target, list | tuple) and all(callable(each) for each in target):
        scores = list(target)
    else:
        scores = integer_targets(target).tolist()
        scores = scores * count if len(scores) == 1 else scores
    if len(scores) != count:
        raise TargetError(f"`target` has {len(scores)} entries for {count} images. Pass one for each, or one for all.")
    return scores


def _warn_of_zero_maps(scores: Scores, batch: tuple[Tensor, ...], maps: tuple[Tensor, ...], first: int) -> None:
    """Warn if the map of a row is zero everywhere, and say why for the first of them."""
    is_zero = torch.stack([each.flatten(1).any(dim=1) for each in maps]).any(dim=0).logical_not()
    if not bool(is_zero.any()):
        return
    rows = is_zero.nonzero().flatten().tolist()
    listed = ", ".join(str(first + row) for row in rows)
    named = f"map of row {listed} is" if len(rows) == 1 else f"maps of rows {listed} are"
    warn(f"The {named} zero everywhere: {scores.why_zero(batch, rows[0])}. Pass another target.", ModelWarning)


def _targets_per_row(target: Target, inputs: Tensor) -> Tensor:
    targets = integer_targets(target).to(inputs.device)
    check_target_count(targets, inputs.shape[0], "batch")
    return targets.expand(inputs.shape[0])
