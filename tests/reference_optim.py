"""Optimizer steps in float64, written from the formulas of csrc/optim/optim.h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def soft(w: Tensor, threshold: Tensor | float) -> Tensor:
    return w.sign() * (w.abs() - threshold).clamp_min(0.0)


def rows(w: Tensor) -> Tensor:
    return w.reshape(w.shape[0], -1) if w.dim() else w.reshape(1, 1)


def penalty(w: Tensor, l1: float = 0.0, l2: float = 0.0, group: float = 0.0) -> float:
    if w.numel() == 0:
        return 0.0
    w = w.detach().double().cpu()
    norms = rows(w).norm(dim=1).sum() * math.sqrt(rows(w).shape[1])
    return float(l1 * w.abs().sum() + l2 / 2 * w.square().sum() + group * norms)


class Reference:
    """Optimizer of one parameter ``p``, which ``step(g)`` updates in float64."""

    def __init__(self, name: str, p: Tensor, **options: Any) -> None:
        self.name = name
        self.p = p.detach().double().cpu().clone()
        self.o = {
            "lr": 1e-3,
            "momentum": 0.0,
            "dampening": 0.0,
            "nesterov": False,
            "betas": (0.9, 0.99 if name == "Lion" else 0.999),
            "eps": {"Adagrad": 1e-10, "LAMB": 1e-6}.get(name, 1e-8),
            "trust_clip": False,
            "always_adapt": False,
            "amsgrad": False,
            "lr_decay": 0.0,
            "alpha": 0.99,
            "centered": False,
            "momentum_decay": 4e-3,
            "decoupled_weight_decay": name in ("AdamW", "Lion"),
            "initial_accumulator_value": 0.0,
            "beta": 1.0,
            "weight_decay": 0.0,
            "maximize": False,
            "l1": 0.0,
            "l2": 0.0,
            "group": 0.0,
            "prox": True,
            **options,
        }
        self.t = 0
        self.product = 1.0
        self.s: dict[str, Tensor] = {}

    def step(self, g: Tensor) -> None:
        o, p, s = self.o, self.p, self.s
        if p.numel() == 0:
            return
        self.t += 1
        lr = o["lr"]
        g = g.detach().double().cpu().clone() * (-1.0 if o["maximize"] else 1.0)
        if o["decoupled_weight_decay"]:
            p = p * (1 - lr * o["weight_decay"])
        elif self.name != "LAMB":
            g = g + o["weight_decay"] * p
        if not o["prox"] and self.name != "FTRL":
            g = g + o["l1"] * self.p.sign() + o["l2"] * self.p
            if o["group"]:
                r = rows(self.p)
                norm = r.norm(dim=1, keepdim=True)
                part = o["group"] * math.sqrt(r.shape[1]) * r / norm
                g = g + torch.where(norm == 0, 0.0, part).reshape(p.shape)
        metric = torch.ones_like(p)
        if self.name == "SGD":
            if o["momentum"]:
                if "b" in s:
                    s["b"] = o["momentum"] * s["b"] + (1 - o["dampening"]) * g
                else:
                    s["b"] = g.clone()
                g = g + o["momentum"] * s["b"] if o["nesterov"] else s["b"]
            p = p - lr * g
        elif self.name in ("Adam", "AdamW"):
            b1, b2 = o["betas"]
            s["m"] = b1 * s.get("m", torch.zeros_like(p)) + (1 - b1) * g
            s["v"] = b2 * s.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
            u = s["v"]
            if o["amsgrad"]:
                u = s["u"] = torch.maximum(s.get("u", u), u)
            metric = (u / (1 - b2**self.t)).sqrt() + o["eps"]
            p = p - lr * s["m"] / (1 - b1**self.t) / metric
        elif self.name == "LAMB":
            b1, b2 = o["betas"]
            s["m"] = b1 * s.get("m", torch.zeros_like(p)) + (1 - b1) * g
            s["v"] = b2 * s.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
            metric = (s["v"] / (1 - b2**self.t)).sqrt() + o["eps"]
            u = s["m"] / (1 - b1**self.t) / metric + o["weight_decay"] * p
            norms = float(p.norm()), float(u.norm())
            if min(norms) > 0 and (o["weight_decay"] or o["always_adapt"]):
                ratio = norms[0] / norms[1]
                lr = lr * (min(ratio, 1.0) if o["trust_clip"] else ratio)
            p = p - lr * u
        elif self.name == "Adagrad":
            lr = lr / (1 + (self.t - 1) * o["lr_decay"])
            start = torch.full_like(p, o["initial_accumulator_value"])
            s["s"] = s.get("s", start) + g * g
            metric = s["s"].sqrt() + o["eps"]
            p = p - lr * g / metric
        elif self.name == "RMSprop":
            a = o["alpha"]
            s["v"] = a * s.get("v", torch.zeros_like(p)) + (1 - a) * g * g
            square = s["v"]
            if o["centered"]:
                s["a"] = a * s.get("a", torch.zeros_like(p)) + (1 - a) * g
                square = square - s["a"] ** 2
            metric = square.sqrt() + o["eps"]
            s["b"] = o["momentum"] * s.get("b", torch.zeros_like(p)) + g / metric
            p = p - lr * s["b"]
        elif self.name == "NAdam":
            b1, b2 = o["betas"]
            mu, after = (
                b1 * (1 - 0.5 * 0.96 ** (t * o["momentum_decay"])) for t in (self.t, self.t + 1)
            )
            # torch keeps it in float32, whatever the parameter's dtype.
            self.product = float(torch.tensor(self.product, dtype=torch.float32) * mu)
            s["m"] = b1 * s.get("m", torch.zeros_like(p)) + (1 - b1) * g
            s["v"] = b2 * s.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
            metric = (s["v"] / (1 - b2**self.t)).sqrt() + o["eps"]
            step = (1 - mu) / (1 - self.product) * g + after / (1 - self.product * after) * s["m"]
            p = p - lr * step / metric
        elif self.name == "Lion":
            b1, b2 = o["betas"]
            m = s.get("m", torch.zeros_like(p))
            c = b1 * m + (1 - b1) * g
            s["m"] = b2 * m + (1 - b2) * g
            if o["prox"] and o["prox"] != "decoupled" and not (o["prox"] is True and o["group"]):
                self.p = self._lion(p, c, lr)
                return
            p = p - lr * c.sign()
        else:
            self.p = self._ftrl(g, lr)
            return
        if not o["prox"]:
            self.p = p
        elif self.name not in ("SGD", "Lion") and o["prox"] != "decoupled":
            waits = torch.zeros_like(p, dtype=torch.bool)
            if self.name == "RMSprop":
                lr = lr / (1 - o["momentum"])
            if o["prox"] != "preconditioned":
                if not o["centered"]:
                    metric = torch.maximum(metric, (o["l1"] + o["l2"] * p.abs()) / 2)
                memory = 1000 if self.name == "Adagrad" else 1 / (1 - self._second())
                squares = s["s"] if self.name == "Adagrad" else s["v"]
                waits = (squares == 0) & (self.t < memory)
            if o["group"] and p.dim() and rows(p).shape[1] > 1:
                shrunk = self._by_rows(p, metric, lr)
            else:
                l1 = o["l1"] + o["group"]
                if o["prox"] != "preconditioned" and not o["centered"]:
                    metric = torch.maximum(metric, (l1 + o["l2"] * p.abs()) / 2)
                shrunk = soft(p, lr * l1 / metric) / (1 + lr * o["l2"] / metric)
            self.p = torch.where(waits, p, shrunk)
        else:
            if o["prox"] != "decoupled" and self.name == "SGD" and o["momentum"]:
                lr = lr * (1 - o["dampening"]) / (1 - o["momentum"])
            v = soft(p, lr * o["l1"])
            if o["group"]:
                r = rows(v)
                cut = lr * o["group"] * math.sqrt(r.shape[1])
                norm = r.norm(dim=1, keepdim=True)
                v = torch.where(norm <= cut, 0.0, r * (1 - cut / norm)).reshape(p.shape)
            self.p = v / (1 + lr * o["l2"])

    def _by_rows(self, p: Tensor, metric: Tensor, lr: float) -> Tensor:
        """Minimize D / (2 lr) (w - p)^2 + R(w) row by row, the norm of each by bisection."""
        o = self.o
        strength = o["group"] * math.sqrt(rows(p).shape[1])
        found = []
        for q, d in zip(rows(p), rows(metric), strict=True):
            if o["prox"] != "preconditioned" and not o["centered"]:
                d = d * max(1.0, strength / 2 / float(d.norm()))
            s = soft(d * q, lr * o["l1"])

            def at(norm: float, s: Tensor = s, d: Tensor = d) -> Tensor:
                return s * norm / ((d + lr * o["l2"]) * norm + lr * strength)

            low, high = 0.0, 10.0 * (1.0 + float(q.norm()))
            for _ in range(200):
                middle = (low + high) / 2
                if float(at(middle).norm()) > middle:
                    low = middle
                else:
                    high = middle
            found.append(torch.where(s.norm() <= lr * strength, 0.0, at(low)))
        return torch.stack(found).reshape(p.shape) if found else p

    def _second(self) -> float:
        return float(self.o["alpha"] if self.name == "RMSprop" else self.o["betas"][1])

    def _lion(self, p: Tensor, c: Tensor, lr: float) -> Tensor:
        """Step by the sign of the penalized gradient, but not through zero."""
        o = self.o
        held = torch.where(c.abs() <= o["l1"], 0.0, c)
        d = torch.where(p == 0, held, c + o["l1"] * p.sign() + o["l2"] * p)
        q = p - lr * d.sign()
        if o["l1"]:
            q = torch.where(q * p < 0, 0.0, q)
        waits = o["prox"] != "preconditioned" and self.t < 1 / (1 - self._second())
        return torch.where((c == 0) & (self.s["m"] == 0) & waits, p, q)

    def _ftrl(self, g: Tensor, lr: float) -> Tensor:
        o, s = self.o, self.s
        if lr == 0.0:
            return self.p
        n = s.get("n", torch.full_like(g, o["initial_accumulator_value"]))
        before = s.get("q", (o["beta"] + n.sqrt()) / lr)
        s["n"] = n + g * g
        s["q"] = (o["beta"] + s["n"].sqrt()) / lr  # of each step's own rate
        s["z"] = z = s.get("z", -self.p * before) + g - (s["q"] - before) * self.p
        return -soft(z, o["l1"]) / (s["q"] + o["l2"])
