"""Stage lists: each function returns {group name: [configuration, ...]}, the most promising groups first."""


def stage_toy():
    """Every code path once, for a toy-size test on the CPU."""
    return {
        "base": [
            {"family": "adam", "group": 32, "name": n, "lr": lr, "wd": 0.1, "ternary": t}
            for n, t in (("qat", 1), ("float", 0))
            for lr in (2e-3, 8e-3, 1e30)
        ],
        "el": [
            {"name": "l15", "levels": 15, "lr": 0.05},
            {"name": "l15m15", "mlev": 15, "lr": 0.15},
            {
                "name": "l16m4",
                "levels": 16,
                "mlev": 4,
                "unit": 0.3,
                "lr": 0.15,
                "weyl": 1,
                "kick": 1,
                "cautious": 1,
                "b2": 0.95,
                "q_out": 2,
            },
            {"name": "boom", "levels": 255, "lr": 1e30},
        ],
        "pre": [
            {
                "name": "l9pre",
                "levels": 9,
                "muon": "pre",
                "lr": 0.05,
                "absmean": 1,
                "scale": 0,
                "meta": 1,
                "colscale": 0.01,
            }
        ],
        "post": [{"name": "l63post", "levels": 63, "mlev": 15, "muon": "post", "lr": 0.05, "ef": 0.1, "sched": 2}],
    }


def stage_small():
    """A check against the second table of DESIGN section 6 (pydoc, G=32, scale 0.03, cosine to 5%)."""
    g = {"group": 32, "scale": 0.03}
    return {
        "base": [
            {"family": "adam", "group": 32, "name": "qat", "lr": 6e-3, "wd": 0.1},
            {"family": "adam", "group": 32, "name": "qat", "lr": 12e-3, "wd": 0.1},
        ],
        "el": [
            dict(g, name="l15", levels=15, lr=0.05),
            dict(g, name="l255", levels=255, lr=0.05, dead=0.25),
            dict(g, name="l15m15", levels=15, mlev=15, lr=0.15),
            dict(g, name="l255m255", levels=255, dead=0.25, mlev=255, unit=4 / 127, lr=0.15),
            dict(g, name="l3m15", levels=3, mlev=15, lr=0.1),
        ],
    }


def stage_ideas():
    """Ideas, one change at a time from 15 levels without momentum, and Newton-Schulz."""
    g = {"group": 32, "scale": 0.03, "levels": 15}
    return {
        "rank": [dict(g, name="rank8", rank=8, lr=0.1), dict(g, name="rank8post", rank=8, muon="post", lr=0.05)],
        "el": [
            dict(g, name="weyl", weyl=1, lr=0.05),
            dict(g, name="kick", kick=1, lr=0.05),
            dict(g, name="q2", q_in=2, lr=0.03),
            dict(g, name="absmean", absmean=1, scale=0, lr=0.05),
            dict(g, name="lr.025", lr=0.025),
            dict(g, name="final0", lr=0.05, final=0),
            dict(g, name="hard score", lr=0.05, score_grad=0),
        ],
        "pre": [dict(g, name="pre", muon="pre", lr=0.05), dict(g, name="pre", muon="pre", lr=0.025)],
        "post": [
            dict(g, name="post", muon="post", mlev=15, lr=0.05),
            dict(g, name="post", muon="post", mlev=15, lr=0.025),
        ],
    }


def grid(base, lrs=(None,), **options):
    """`base` with every combination of `lrs` (key lr) and the lists in `options`; a name gets no suffix."""
    out = [dict(base, lr=lr) if lr is not None else dict(base) for lr in lrs]
    for key, values in options.items():
        out = [dict(c, **{key: v}) for c in out for v in values]
    return out


def baselines(qat=(2e-3, 4e-3, 6e-3, 8e-3, 12e-3, 16e-3), plain=(1e-3, 2e-3, 4e-3)):
    """QAT-AdamW over learning rates, decay, second-moment constant and embedding init; float AdamW."""
    q = {"family": "adam", "group": 32, "name": "qat", "wd": 0.1}
    return (
        grid(q, qat)
        + grid(q, (4e-3, 8e-3), wd=[0.01], b2a=[0.98])
        + grid(q, (4e-3, 8e-3), emb_std=[0.4])
        + grid(dict(q, name="float", ternary=0), plain)
    )


def L(levels, mlev=1, **kw):
    """A latent of `levels` with a momentum of `mlev` levels; the unit puts the momentum's range near 1 RMS of u."""
    unit = {
        1: 1.0,
        2: 0.5,
        3: 0.45,
        4: 0.35,
        5: 0.3,
        7: 0.25,
        8: 0.22,
        15: 0.15,
        16: 0.15,
        27: 0.09,
        31: 0.075,
        63: 0.04,
    }
    dead = 0.25 if levels > 27 else 1 / 3
    return dict(
        {
            "levels": levels,
            "mlev": mlev,
            "unit": unit.get(mlev, 4 / 127),
            "dead": dead,
            "weyl": 1,
            "name": f"L{levels}M{mlev}",
        },
        **kw,
    )


def stage_A():
    """Screening: one program a group, the most promising first (see README for why)."""
    lr8 = {"muon": "post", "group": 256, "rank": 8, "q_out": 2, "beta": 0.95}
    lr16 = dict(lr8, rank=16)
    post, el, el32 = {"group": 128, "muon": "post"}, {"group": 256}, {"group": 32}
    m8, m4 = L(255, 255, **post), L(16, 16, **el32)
    return {
        "base": baselines(),
        # at most 4 bits (L9), 6.5 (L32) and 10.3 (L255), all in one program
        "rank8": (
            grid(L(9, 1, **lr8), (0.025, 0.05, 0.1), beta=[0.9, 0.95, 0.98])
            + grid(L(9, 1, **lr8), (0.05,), q_out=[1, 3])
            + grid(L(9, 1, **lr8), (0.05,), resid=[0.3])
            + grid(L(9, 1, **lr8), (0.05,), weyl=[0])
            + grid(L(32, 1, **lr8), (0.025, 0.05, 0.1))
            + grid(L(255, 1, **lr8), (0.025, 0.05))
            + grid(L(255, 1, **lr8), (0.025, 0.05, 0.1), q_out=[1])
            + grid(L(255, 1, **lr8), (0.025,), beta=[0.9, 0.98], q_out=[1])
            + grid(L(32, 1, **lr8), (0.05,), q_out=[1, 1.5])
            + grid(L(32, 1, **lr8), (0.05,), beta=[0.9, 0.98])
            + grid(L(32, 1, **lr8), (0.05,), final=[0])
            + grid(L(9, 1, **lr8), (0.05,), final=[0], scale=[0.02, 0.04])
            + grid(L(9, 1, **lr8), (0.05,), scale=[0.01])
            + grid(L(9, 1, **lr8), (0.05,), lr_emb=[3], lr_head=[3])
        ),
        # at most 18.3 (L255M255) and 10.3 bits
        "post": (
            grid(m8, (0.0125, 0.025, 0.05, 0.1))
            + grid(m8, (0.05,), beta=[0.95, 0.98])
            + grid(m8, (0.05,), q_out=[1.5, 2])
            + grid(m8, (0.05,), rc=[0])
            + grid(m8, (0.05,), final=[0])
            + grid(m8, (0.05,), lr_emb=[3], lr_head=[3])
            + grid(m8, (0.05,), rc_out=[1])
            + grid(L(32, 16, **post), (0.025, 0.05))
            + grid(L(27, 27, **post), (0.025, 0.05))
        ),
        "rank16": (
            grid(L(32, 1, **lr16), (0.025, 0.05, 0.1))
            + grid(L(32, 1, **lr16), (0.05,), beta=[0.98])
            + grid(L(255, 1, **lr16), (0.0125, 0.025, 0.05), q_out=[1])
            + grid(L(255, 1, **lr16), (0.025,), beta=[0.98], q_out=[1])
        ),
        # no Newton-Schulz: the simpler rule at the same budgets
        "el": (
            grid(L(9, 1, **el), (0.025, 0.05, 0.1), q_in=[2])
            + grid(L(9, 1, **el), (0.05,), weyl=[0, 1])
            + grid(L(3, 3, **el), (0.03,))
            + grid(L(11, 1, **el), (0.05,), q_in=[2])
            + grid(L(9, 1, **el), (0.05,), q_in=[2], colscale=[0.02])
            + grid(L(16, 4, **el), (0.1,), q_out=[1, 2])
            + grid(L(9, 7, **el), (0.1,), q_out=[1, 2])
            + grid(L(63, 1, **el), (0.05,), q_in=[1, 2])
            + grid(L(255, 255, **el), (0.05, 0.1))
        ),
        "el32": (
            grid(m4, (0.1, 0.2))
            + grid(m4, (0.1,), weyl=[0])
            + grid(m4, (0.1,), q_out=[2])
            + grid(L(15, 1, **el32), (0.05,), weyl=[0])
            + grid(L(255, 1, **el32), (0.05,), weyl=[0])
            + grid(L(255, 255, **el32), (0.1,), weyl=[0])
            + grid(m4, (0.1,), b2=[0.95])
        ),
        # an elementwise momentum of few levels under Newton-Schulz (its rounding noise is amplified: expected to lose)
        "post256": (
            grid(L(16, 4, group=256, muon="post"), (0.05,), q_out=[1, 2])
            + grid(L(9, 7, group=256, muon="post"), (0.05,), q_out=[1, 2])
            + grid(L(3, 3, group=256, muon="post"), (0.02,), q_out=[1, 2])
            + grid(L(21, 3, group=256, muon="post"), (0.05,), q_out=[1, 2])
        ),
    }


def stage_A2():
    """After A: low-rank momentum at exact trit planes (dead zone a third), faster tables, decay to zero, spread."""
    lr16 = {"muon": "post", "group": 256, "rank": 16, "q_out": 2, "beta": 0.95, "final": 0, "lr_emb": 3, "lr_head": 3}
    lr8, lr32 = dict(lr16, rank=8), dict(lr16, rank=32)
    t243, t27, t9 = (L(n, 1, dead=1 / 3, **lr16) for n in (243, 27, 9))
    m8 = L(255, 255, muon="post", group=128, final=0, lr_emb=3, lr_head=3)
    return {
        "rank16": (
            [
                dict(t243, lr=0.05),
                dict(t243, lr=0.1),
                dict(t243, lr=0.05, spread=1.5),
                dict(t243, lr=0.1, spread=1.5),
                dict(t243, lr=0.05, dead=0.25),
                dict(t243, lr=0.07, dead=0.25, spread=1.5),
                dict(t243, lr=0.05, lr_emb=1, lr_head=1),
                dict(t243, lr=0.05, lr_emb=6, lr_head=6),
                dict(t243, lr=0.05, beta=0.97),
                dict(t243, lr=0.05, nest=0.2),
                dict(t27, lr=0.1),
                dict(t27, lr=0.1, spread=1.5),
                dict(t27, lr=0.2, spread=1.5),
                dict(t27, lr=0.1, q_out=3),
                dict(t27, lr=0.1, lr_emb=1, lr_head=1),
                dict(t27, lr=0.1, final=0.05),
                dict(t243, lr=0.05, q_out=1.5),
                dict(t243, lr=0.05, q_out=3),
                dict(t243, lr=0.05, wd=0.1),
                dict(t243, lr=0.05, cautious=1),
                dict(t243, lr=0.05, scale=0.01),
                dict(t243, lr=0.05, scale=0.04),
                dict(t243, lr=0.05, sched=1),
                dict(t243, lr=0.05, warm=300),
                dict(t27, lr=0.1, wd=0.1),
                dict(t27, lr=0.1, nest=0.2),
                dict(t27, lr=0.1, scale=0.01),
                dict(t27, lr=0.1, beta=0.97),
                dict(t27, lr=0.15),
                dict(t27, lr=0.1, lr_emb=3, lr_head=1),
                dict(t27, lr=0.1, lr_emb=1, lr_head=3),
                dict(t27, lr=0.1, absmean=1, scale=0),
            ]
        ),
        "post": [
            dict(m8, lr=lr, **kw) for lr in (0.05, 0.07) for kw in ({}, {"wd": 0.1}, {"dead": 1 / 3}, {"nest": 0.1})
        ]
        + [
            dict(m8, lr=0.05, **kw)
            for kw in (
                {"b2": 0.95},
                {"spread": 1.5},
                {"lr_emb": 6, "lr_head": 6},
                {"sched": 1},
                {"q_out": 1.5},
                {"scale": 0.01},
                {"scale": 0.04},
                {"beta": 0.93},
            )
        ],
        "rank8": [
            dict({**t9, **lr8}, lr=lr, **kw)
            for lr in (0.05, 0.08)
            for kw in ({}, {"spread": 1.5}, {"spread": 1.2}, {"wd": 0.1}, {"nest": 0.2}, {"scale": 0.04})
        ]
        + [dict({**t27, **lr8, "lr": 0.1}, **kw) for kw in ({}, {"q_out": 3}, {"spread": 1.5}, {"lr": 0.05})],
        "rank32": [
            dict({**t243, **lr32}, lr=lr, **kw)
            for lr in (0.05, 0.1)
            for kw in ({}, {"q_out": 1.5}, {"dead": 0.25}, {"spread": 1.5})
        ],
    }


def stage_A3():
    """After A2: stored second moments (b2), caution with low-rank momentum, and what Newton-Schulz itself is worth."""
    lr16 = {"muon": "post", "group": 256, "rank": 16, "q_out": 2, "beta": 0.95, "final": 0, "lr_emb": 3, "lr_head": 3}
    lr8 = dict(lr16, rank=8)
    t243, t27, t9 = (L(n, 1, dead=1 / 3, **lr16) for n in (243, 27, 9))
    t243, t27 = dict(t243, lr=0.05, nest=0.2), dict(t27, lr=0.1, lr_emb=1, lr_head=1)
    m8 = L(255, 255, muon="post", group=128, final=0, lr_emb=3, lr_head=3, b2=0.95, lr=0.05)
    b2, caution = {"b2": 0.95}, {"cautious": 1}
    return {
        "rank16": [
            dict(t243, **kw)
            for kw in (
                {},
                b2,
                caution,
                b2 | caution,
                b2 | {"lr": 0.08},
                b2 | {"b2": 0.9},
                b2 | {"nest": 0.4},
                {"nest": 0.4},
            )
        ]
        + [
            dict(t27, **kw)
            for kw in (
                b2,
                caution,
                b2 | caution,
                b2 | {"nest": 0.2},
                b2 | {"lr": 0.07},
                b2 | {"lr": 0.14},
                {"lr": 0.07},
                b2 | {"lr_head": 3},
            )
        ],
        "rank8": [
            dict({**t9, **lr8, "lr": 0.05}, **kw)
            for kw in (
                b2,
                caution,
                b2 | caution,
                b2 | {"lr": 0.08},
                b2 | {"scale": 0.04},
                {"nest": 0.1},
                b2 | {"lr_emb": 1, "lr_head": 1},
                b2 | {"lr": 0.035},
            )
        ]
        + [dict({**t27, **lr8}, **kw) for kw in (b2, b2 | caution)]
        + [dict({**t243, **lr8}, **kw) for kw in ({}, b2, {"nest": 0.3})]
        + [dict({**t9, **lr8, "lr": 0.05, "levels": 27, "dead": 1 / 3}, **kw) for kw in ({}, b2, {"nest": 0.1})],
        "post": [
            dict(m8, **kw)
            for kw in (
                {},
                {"q_out": 1.5},
                {"nest": 0.1},
                {"b2": 0.98},
                {"b2": 0.9},
                {"lr": 0.07},
                {"lr": 0.035},
                {"levels": 243, "dead": 1 / 3},
            )
        ],
        "no NS": [
            dict(t243, muon="none", **kw)
            for kw in ({}, {"lr": 0.1}, {"lr": 0.1, "lr_emb": 1, "lr_head": 1, "q_out": 1}, b2 | {"lr": 0.1})
        ]
        + [dict(t27, muon="none", **kw) for kw in ({}, {"lr": 0.2}, {"q_out": 1}, b2)],
    }


def stage_B():
    """Confirmation (--use 0 1 2 --seeds 0 1): the baseline near its best, and one or two rules a budget."""
    lr8 = {"muon": "post", "group": 256, "rank": 8, "q_out": 2, "beta": 0.95}
    return {
        "base": baselines(qat=(4e-3, 8e-3, 12e-3), plain=(2e-3,)),
        "rank8": grid(L(9, 1, **lr8), (0.05, 0.1))
        + grid(L(32, 1, **lr8), (0.05,))
        + grid(L(255, 1, **lr8), (0.025,), q_out=[1]),
        "post": grid(L(255, 255, group=128, muon="post"), (0.025, 0.05)),
    }


def stage_small4():
    """A CPU look at the 4-bit and 10-bit budgets (G=128 or 32)."""
    g = {"group": 128, "scale": 0.03}
    return {
        "a": [
            L(9, 1, lr=0.05, **g),
            L(9, 1, lr=0.1, q_in=2, **g),
            L(16, 16, lr=0.15, **g),
            L(3, 3, lr=0.1, **g),
            L(9, 1, lr=0.05, thresh=1, **g),
            L(9, 7, lr=0.15, **g),
            L(9, 1, lr=0.1, **g),
            L(16, 16, lr=0.15, weyl_m=1, **g),
        ],
    }


def stage_small5():
    """A CPU look at low-rank momentum with Newton-Schulz at 4 bits."""
    g = {"group": 128, "scale": 0.03, "rank": 8, "muon": "post"}
    return {
        "a": [
            L(9, 1, lr=0.05, **g),
            L(9, 1, lr=0.05, q_out=2, **g),
            L(9, 1, lr=0.05, beta=0.95, **g),
            L(9, 1, lr=0.05, nest=0.3, **g),
        ],
        "b": [
            L(9, 1, lr=0.05, q_out=2, beta=0.95, **g),
            L(9, 1, lr=0.05, q_out=2, resid=0.3, **g),
            L(9, 1, lr=0.1, q_out=2, beta=0.95, **g),
            L(9, 1, lr=0.05, q_out=3, beta=0.95, **g),
            L(9, 1, lr=0.05, q_out=2, beta=0.98, **g),
        ],
    }


def stage_small6():
    """A CPU look at q_out with 4-bit and 8-bit momentum, and Newton-Schulz on a well-resolved momentum."""
    g = {"group": 128, "scale": 0.03}
    return {
        "el": [L(16, 16, lr=0.15, q_out=2, **g), L(9, 7, lr=0.15, q_out=2, **g), L(255, 255, lr=0.15, q_out=1.5, **g)],
        "post": [L(255, 255, lr=0.05, muon="post", **g), L(16, 16, lr=0.05, q_out=2, muon="post", **g)],
    }


def stage_small7():
    """A CPU look at low-rank momentum at the larger budgets."""
    g = {"group": 128, "scale": 0.03, "rank": 8, "muon": "post", "beta": 0.95, "lr": 0.05}
    return {"a": [L(32, 1, q_out=2, **g), L(255, 1, **g), L(32, 1, **g), L(255, 1, q_out=2, **g)]}
