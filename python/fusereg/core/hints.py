"""Hints for users who know the names of torch, Keras, Lightning or timm."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, cast

import torch

#: From which share of letters on a name is a parameter's, misspelled, where any name may be given.
ALIKE = 0.8
#: A function or a class.
F = TypeVar("F", bound=Callable[..., Any])

_NONE: Mapping[str, str] = MappingProxyType({})
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

#: What torch, Keras, Lightning, torchvision, timm, kornia and albumentations call an argument that
#: has this name here. The first of them that a function has is what is meant.
SYNONYMS = {
    name: frozenset(others.split())
    for name, others in {
        "p": "prob proba probability rate ratio drop_prob drop_rate drop_path_rate dropout_rate "
        "dropout_prob dropout dropout_p drop",
        "dropout": "p drop_rate dropout_rate dropout_p",
        "input": "x inputs logits y_pred output preds",
        "x": "input inputs image images img tensor sample",
        "target": "targets labels y y_true",
        "num_features": "channels num_channels features in_features out_channels filters",
        "in_features": "input_dim in_dim in_channels num_inputs",
        "out_features": "units output_dim out_dim num_outputs",
        "in_channels": "in_features in_chans",
        "out_channels": "filters out_features",
        "activation": "act act_layer act_fn activation_fn nonlinearity",
        "negative_slope": "slope alpha leak",
        "block_size": "kernel_size size",
        "normalized_shape": "dim hidden_size size d_model",
        "eps": "epsilon layer_norm_eps",
        "elementwise_affine": "affine scale",
        "training": "train is_training",
        "inplace": "in_place inplace_forward",
        "seed": "random_state rng random_seed",
        "weight": "class_weights weights gamma",
        "bias": "use_bias beta",
        "running_mean": "moving_mean mean",
        "running_var": "moving_variance moving_var var",
        "virtual_batch_size": "ghost_batch_size batch_size",
        "ignore_index": "ignore_label ignore pad_token_id padding_idx",
        "label_smoothing": "smoothing smooth label_smooth smooth_eps epsilon",
        "lr": "learning_rate step_size",
        "betas": "beta beta1 beta2 beta_1 beta_2 b1 b2",
        "beta": "betas",
        "alpha": "rho smoothing_constant beta beta2",
        "momentum": "mom",
        "weight_decay": "wd decay decay_rate",
        "max_grad_norm": "max_norm clipnorm clip_norm clip grad_clip clip_grad global_clipnorm "
        "gradient_clip_val gradient_clipping",
        "ema_decay": "ema ema_momentum use_ema",
        "max_norm": "max_grad_norm clip_norm clip_value grad_clip gradient_clip_val",
        "clip_value": "value max_value clipvalue gradient_clip_val",
        "clip_factor": "clipping clip factor agc_clip",
        "parameters": "params model",
        "params": "parameters weights model var_list",
        "tensors": "parameters params grads gradients",
        "l1": "l1_strength l1_lambda lambda_l1 lambda1 l1_weight alpha_l1 lasso "
        "l1_regularization_strength",
        "l2": "l2_strength l2_lambda lambda_l2 lambda2 l2_weight alpha_l2 ridge "
        "l2_regularization_strength",
        "group": "group_lasso group_strength",
        "strength": "l1 l2 alpha lambda_ coefficient coef scale penalty factor reg",
        "threshold": "l1 strength lam lambda_ alpha",
        "strengths": "alphas lambdas l1 grid",
        "factor": "lr_lambda schedule gamma",
        "dim": "axis group_dim",
        "group_dim": "dim axis",
        "size": "image_size img_size output_size crop_size height width input_size resolution",
        "degrees": "rotation rotate angle limit rotate_limit rotation_range",
        "hflip": "horizontal_flip flip hflip_prob fliplr flip_prob RandomHorizontalFlip",
        "vflip": "vertical_flip vflip_prob flipud",
        "translate": "translation shift shift_limit width_shift_range height_shift_range",
        "scale": "zoom zoom_range scale_limit",
        "erase": "random_erasing random_erase erasing re_prob reprob",
        "reprob": "re_prob random_erase_prob erase",
        "mix": "mixup cutmix",
        "mixup": "mixup_alpha",
        "cutmix": "cutmix_alpha",
        "mix_prob": "mixup_prob",
        "mix_switch": "mixup_switch_prob switch_prob",
        "mix_mode": "mixup_mode",
        "policy": "auto_augment auto_augment_policy aa autoaugment",
        "crop_scale": "rrc_scale",
        "crop_ratio": "rrc_ratio",
        "fill": "value fillcolor fill_value cval padding_value border_value mask_value",
        "fill_mode": "padding_mode border_mode mode",
        "padding_mode": "fill_mode border_mode",
        "interpolation": "resample mode method align resampling",
        "std": "stdev stds variance",
        "mean": "means",
        "num_classes": "classes n_classes nb_classes",
        "out_dtype": "dtype",
        "num_ops": "n num_layers augmentations_per_image",
        "magnitude": "m",
        "matrix": "theta M affine transform",
        "mask_fill": "ignore_index ignore",
        "ignore": "ignore_index mask_fill",
        "base": "base_size",
        "model": "module net network",
        "make_model": "model model_fn build",
        "example_inputs": "input_shape input_size sample inputs example_input dummy_input x",
        "round_to": "divisor round_to_multiple multiple_of",
        "exclude": "skip ignore ignored_layers except_",
        "include": "only layers modules",
        "mode": "direction",
        "patience": "n_iter_no_change wait num_bad_epochs",
        "dataset": "data",
        "window": "window_size n size",
        "decay": "alpha beta momentum",
        "folder": "path filepath checkpoint_dir dirpath directory",
    }.items()
}


def install(package: str) -> None:
    """Let the faces name what is meant by a name that they don't have.

    Set here, not written in them: a type checker takes any name from a module that has the method.
    """
    for name, torchs in (
        ("nn", torch.nn),
        ("functional", torch.nn.functional),
        ("optim", torch.optim),
    ):
        module = sys.modules[f"{package}.{name}"]
        vars(module)["__getattr__"] = functools.partial(_missing, module, torchs)


def _missing(module: Any, torchs: Any, name: str) -> Any:
    text = f"module {module.__name__!r} has no attribute {name!r}"
    if name[0] != "_":
        names = {known.lower(): known for known in module.__all__}
        if hasattr(torchs, name):
            text += f"; use {torchs.__name__}.{name}, which goes with all of fusereg"
        elif close := difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.75):
            text += f"; did you mean {names[close[0]]}?"
    raise AttributeError(text)


def check_names(
    op: str, given: Iterable[str], known: Iterable[str], elsewhere: Mapping[str, str] = _NONE
) -> None:
    """Raise TypeError for a name of an argument that is not known, and say what may be meant."""
    known = list(known)
    for name in given:
        if name not in known:
            hint = elsewhere.get(name) or _meant(name, known)
            raise TypeError(f"{op}: unknown argument {name!r}; {hint}")


def _meant(name: str, known: list[str]) -> str:
    """Return what an unknown name may mean, by what it is elsewhere or by its letters."""
    wanted = [ours for ours in known if name in SYNONYMS.get(ours, ())]
    if not wanted:
        names = {ours.lower(): ours for ours in known}
        wanted = [names[close] for close in difflib.get_close_matches(name.lower(), names, n=1)]
    if wanted:
        return f"did you mean {wanted[0]}?"
    return f"it takes {', '.join(known)}"


#: What explains the unknown names that a function takes as ``**unknown``.
_REFUSE: dict[Callable[..., Any], Callable[[tuple[Any, ...], Iterable[str]], None]] = {}


def refuse(function: Callable[..., Any], unknown: Iterable[str]) -> NoReturn:
    """Raise TypeError for names that a function of :func:`explains` took as ``**unknown``."""
    _REFUSE[function]((), unknown)
    raise AssertionError("the name is known")


def explains(
    op: str | Callable[[Any], str] = "",
    elsewhere: Mapping[str, str] = _NONE,
    more: Iterable[str] = (),
) -> Callable[[F], F]:
    """Return a decorator of public functions and classes that explains arguments that do not fit.

    A function that is called for each layer and batch takes unknown names itself, in the parameter
    ``**unknown: NoReturn``, and gives them to :func:`refuse`: its signature does not show it, type
    checkers refuse what it would take, and it is not called through another function.

    Args:
        op: the name for the message, or what returns it for the first argument; default: fusereg's
            attribute of this name.
        elsewhere: arguments of other libraries' functions, and what to do instead; read before
            :data:`SYNONYMS`.
        more: the names that the function's ``**`` takes. Without any it takes every name but those
            in ``elsewhere`` and those that seem to be a parameter's, misspelled.
    """

    def decorate(function: F) -> F:
        if isinstance(function, type):
            made: Any = function
            name = op or f"fusereg.{function.__name__}"
            made.__init__ = explains(name, elsewhere, more)(made.__init__)
            return function
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        constructs = function.__name__ == "__init__"
        named = [p.name for p in parameters[constructs:] if p.kind not in _COLLECTING]
        known = [*named, *more]
        any_name = not more and any(p.kind is p.VAR_KEYWORD for p in parameters)

        def refuse(args: tuple[Any, ...], given: Iterable[str]) -> None:
            where = op(args[0]) if callable(op) else op or f"fusereg.{function.__name__}"
            # One of several constructors that pass arguments on knows the class's, too.
            own = inspect.signature(type(args[0])).parameters if callable(op) else {}
            names = [n for n, p in own.items() if n not in known and p.kind not in _COLLECTING]
            check_names(where, given, [*known, *names], elsewhere)

        if parameters and parameters[-1].name == "unknown":
            _REFUSE[function] = refuse
            vars(function)["__signature__"] = signature.replace(parameters=parameters[:-1])
            return function

        @functools.wraps(function)
        def explained(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    if not any_name:
                        refuse(args, given)
                    if name in elsewhere or difflib.get_close_matches(name, named, 1, ALIKE):
                        refuse(args, [name])
            if constructs:
                try:
                    signature.bind(*args, **given)
                except TypeError as error:
                    where = op(args[0]) if callable(op) else op
                    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
                    too_many = by_name and "too many" in str(error)
                    hint = f"; by name go {', '.join(by_name)}" if too_many else ""
                    raise TypeError(f"{where}: {error}{hint}") from None
            return function(*args, **given)

        return cast(F, explained)

    return decorate


def public_class(instance: object) -> type:
    """Return the class of an object, or the one of fusereg that a user's class is made from."""
    return next(c for c in type(instance).__mro__ if c.__module__.startswith("fusereg."))
