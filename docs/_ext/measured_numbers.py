"""The measured numbers in the prose of the documentation, computed from the CSV files in ``benchmarks/results``.

A page refers to a number as ``{{ speed.eager_10 }}``: a function of this module, and a name that it defines. conf.py
passes the result of :func:`read_numbers` to MyST as substitutions, so that a new run of a benchmark changes the prose
together with its table. A missing or ambiguous row ends the build with an error that names file and row, and so does an
undefined name. To add a number, define it here and use it: a test checks that every number is used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd

__all__ = ["read_numbers"]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Numbers = dict[str, str]


class Results:
    """The rows of the CSV files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, study: str, /, **where: object) -> pd.DataFrame:
        """Return the rows of a study that have these values.

        Raises:
            LookupError: if there are none.
        """
        table = pd.read_csv(self.folder / f"{study}.csv")
        for column, value in where.items():
            table = table[table[column].astype(str) == str(value)]
        if table.empty:
            raise LookupError(f"{self.folder / study}.csv has no row with {where}; one is quoted")
        return table

    def row(self, study: str, /, **where: object) -> pd.Series:
        """Return the only row of a study that has these values.

        Raises:
            LookupError: if there is none, or more than one.
        """
        rows = self.rows(study, **where)
        if len(rows) > 1:
            raise LookupError(f"{self.folder / study}.csv has {len(rows)} rows with {where}; one is quoted")
        return rows.iloc[0]

    def ratio(self, study: str, competitor: str, reference: str, /, **where: object) -> float:
        """Return the median over the rounds of the ratio of two times.

        Raises:
            LookupError: if one of them was not measured.
        """
        rounds = [self.row(study, competitor=name, **where)["rounds"] for name in (competitor, reference)]
        if any(pd.isna(each) for each in rounds):
            raise LookupError(f"{self.folder / study}.csv has no times of {competitor} and {reference} with {where}")
        times, reference_times = (pd.Series([float(ms) for ms in str(each).split()]) for each in rounds)
        return float((times / reference_times).median())


def digits(count: int, value: float) -> str:
    """Return a number with some significant digits, and with commas between thousands."""
    rounded = float(f"{value:.{count}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (count - 1) else f"{value:#.{count}g}"


def span(values: Iterable[float]) -> str:
    """Return the smallest and the largest value, with two digits."""
    values = list(values)
    ends = dict.fromkeys(digits(2, end) for end in (min(values), max(values)))
    return " to ".join(ends)


# -- one function per page ---------------------------------------------------------------------------------------------


def speed(results: Results) -> Numbers:
    steps = partial(results.ratio, "speed_steps")
    usual = {"particles": 32, "hidden": 64}
    ratios = {
        "eager_10": steps("Pyro SVI", "fit", dim=10, **usual),
        "eager_500": steps("Pyro SVI", "fit", dim=500, **usual),
        "compiled_10": steps("Pyro SVI", "fit, compiled", dim=10, **usual),
        "compiled_500": steps("Pyro SVI", "fit, compiled", dim=500, **usual),
        "hand_10": steps("by hand", "fit", dim=10, **usual),
        "hand_10000": steps("by hand", "fit", dim=10000, **usual),
        "scan_10": steps("fit, compiled", "NumPyro, scan", dim=10, **usual),
        "scan_1": steps("fit, compiled", "NumPyro, scan", dim=10, particles=1, hidden=64),
        "scan_wide": steps("fit, compiled", "NumPyro, scan", dim=500, particles=32, hidden=500),
        "loop_10": steps("NumPyro, loop", "fit, compiled", dim=10, **usual),
        "floor_500": steps("fit, compiled", "floor: both", dim=500, **usual),
        "floor_256": steps("fit, compiled", "floor: both", dim=500, particles=256, hidden=64),
        **{
            f"inverse_{dim}": results.ratio("speed_inverse", "one coordinate after the other", "ours", dim=dim)
            for dim in (10, 100, 500)
        },
    }
    first_call = results.rows("speed_steps").groupby("competitor")["first"]
    compilers = {"compile": "fit, compiled", "compile_again": "fit, compiled, again", "compile_scan": "NumPyro, scan"}
    eager, compiled = (
        results.row("speed_steps", competitor=name, dim=10, **usual) for name in ("fit", "fit, compiled")
    )
    settings = results.rows("speed_vae", competitor="ours")[["posterior", "batch"]].to_dict("records")
    loops = {"vae_ours": "ours", "vae_compiled": "ours, compiled", "vae_svi": "Pyro SVI"}
    neutra = results.rows("neutra").groupby("method")["ess_per_second"].median()
    return {
        **{name: digits(2, ratio) for name, ratio in ratios.items()},
        **{name: span(first_call.get_group(competitor).dropna()) for name, competitor in compilers.items()},
        **{
            name: span(results.ratio("speed_vae", loop, "by hand", **setting) for setting in settings)
            for name, loop in loops.items()
        },
        "repaid": digits(2, 1e3 * (compiled["first"] - eager["first"]) / (eager["ms"] - compiled["ms"])),
        "neutra": digits(2, neutra["NeuTra"] / neutra["NUTS"]),
        **time_to_the_evidence(results),
    }


def time_to_the_evidence(results: Results) -> Numbers:
    """Count the targets that each guide reaches; compare times where both reach the target."""
    rows = results.rows("speed_gap")
    numbers = {}
    for name, competitor in {"fit": "fit", "pyro": "Pyro AutoIAFNormal", "numpyro": "NumPyro AutoIAFNormal"}.items():
        near = rows[(rows["competitor"] == competitor) & rows["near"]].set_index(["target", "dim"])["seconds"]
        numbers[f"gap_{name}"] = str(len(near))
        if name == "fit":
            fit = near
        else:
            numbers[f"gap_{name}_times"] = span((near / fit).dropna())
    return numbers


def large(results: Results) -> Numbers:
    rows = results.rows("large", dim=results.rows("large")["dim"].max())
    return {"dim": f"{rows['dim'].iloc[0]:,}", "fit_memory": span(rows["fit_mib"] / rows["step_mib"])}


def posteriordb(results: Results) -> Numbers:
    import posteriordb_report as report

    table = report.read(results.folder / "posteriordb.csv")
    fits, chains = table[~table["is_chain"]], table[table["is_chain"]]
    reached = report.meets_all(fits).groupby(fits["guide"]).sum()
    nuts = chains.loc[chains["verdict"] == "reached", "cpu_seconds"]
    seconds = fits.groupby("guide")["seconds"]
    return {
        "posteriors": str(fits["posterior"].nunique()),
        **{f"{name}_reached": str(reached[name]) for name in ("iaf", "maf")},
        **{f"{name}_median": f"{seconds.median()[name]:.1f}" for name in ("iaf", "maf")},
        **{f"{name}_longest": f"{seconds.max()[name]:.1f}" for name in ("iaf", "maf")},
        "pyro_reached": largest(reached, "Pyro Auto"),
        "numpyro_reached": largest(reached, "NumPyro Auto"),
        "nuts_reached": str(len(nuts)),
        "nuts_seconds": f"{nuts.min():.0f} to {nuts.max():.0f}",
        "violations": str(fits[fits["guide"].isin(report.FLOWS)]["violation"].sum()),
    }


def race(results: Results) -> Numbers:
    rows = results.rows("posteriordb_race")
    seconds = rows[rows["reached"]].pivot(index="posterior", columns="guide", values="cpu_seconds")
    reached, nuts = seconds.count(), seconds["Pyro NUTS"]
    fit, shortest = "pyro_flowguides iaf", "pyro_flowguides iaf, shortest"
    return {
        "posteriors": str(rows["posterior"].nunique()),
        "fit_reached": str(reached[fit]),
        "fit_first": str((seconds.drop(columns=shortest).idxmin(axis=1) == fit).sum()),
        "shortest_first": str((seconds.drop(columns=fit).idxmin(axis=1) == shortest).sum()),
        "pyro_reached": largest(reached, "Pyro Auto"),
        "numpyro_reached": largest(reached, "NumPyro Auto"),
        "nuts_reached": str(reached["Pyro NUTS"]),
        "nuts_seconds": f"{nuts.min():.0f} to {nuts.max():.0f}",
    }


def largest(counts: pd.Series, prefix: str) -> str:
    """Return the largest count among the guides whose names start with the prefix."""
    return str(counts[counts.index.str.startswith(prefix)].max())


def amortized(results: Results) -> Numbers:
    elbo = results.rows("amortized").pivot(index="seed", columns="posterior", values="elbo")
    gain = elbo["IAF"] - elbo["diagonal Gaussian"]
    return {
        "gain": f"{gain.min():.1f} to {gain.max():.1f}",
        "path_iaf": digits(2, results.row("path_gradient", flow="iaf")["ratio"]),
    }


def vae_posteriors(results: Results) -> Numbers:
    rows = results.rows("vae_posteriors")
    loss = rows.pivot(index="seed", columns="family", values="test")
    gain = -loss.sub(loss["diagonal Gaussian"], axis=0)
    parameters = rows.groupby("family")["parameters"].first()
    families = {
        "planar": "planar x4",
        "pyro_planar": "Pyro conditional planar x4",
        "iaf": "IAF, affine x4",
        "pyro_iaf": "Pyro conditional IAF x4",
        "gated": "IAF, gated x4",
    }
    numbers = {name: f"{gain[family].mean():.2f}" for name, family in families.items()}
    for name, family in {"iaf": "IAF, affine x4", "realnvp": "RealNVP x6"}.items():
        path, total = gain[[family, f"{family}, total gradient"]].dropna().mean()
        numbers |= {f"{name}_path": f"{path:.2f}", f"{name}_total": f"{total:.2f}"}
    times = parameters[families["pyro_planar"]] / parameters[families["planar"]]
    return {**numbers, "pyro_parameters": digits(1, times)}


def vlae(results: Results) -> Numbers:
    models = {"plain": "VAE", "iaf": "IAF-VAE", "prior": "AF-prior VAE", "vlae": "VLAE", "pixelcnn": "PixelCNN alone"}
    compared = {
        name: results.row("vlae_compare", model=model, steps=2000, learning_rate=0.002)
        for name, model in models.items()
    }
    cold = partial(results.row, "vlae_window_gated_pixelcnn")
    windows = {
        "cold_elbo": cold(reach=6, free_bits=0.0),
        "free_elbo": cold(reach=6, free_bits=7.84),
        "cold_elbo_1": cold(reach=1, free_bits=0.0),
        "warm_elbo_1": results.row("vlae_window_pixelcnn", reach=1, free_bits=0.0),
    }
    faces = [float(nll) for nll in results.row("vlae_frey", model="VLAE")["nll_by_seed"].split()]
    return {
        **{name: f"{row['nll_given_z'] + row['kl']:.1f}" for name, row in windows.items()},
        **{
            f"{name}_gap": f"{compared[name]['negative_elbo'] - compared[name]['nll']:.1f}"
            for name in ("plain", "iaf", "prior")
        },
        "over_pixelcnn": f"{compared['pixelcnn']['nll'] - compared['vlae']['nll']:.1f}",
        "kl": f"{compared['vlae']['kl']:.1f}",
        "faces_range": f"{max(faces) - min(faces):.0f}",
    }


def reliability(results: Results) -> Numbers:
    fits, flips = (results.row("faults", study=study) for study in ("fits in one process", "flipped bits"))
    if results.rows("faults")["different"].sum():
        raise LookupError("faults.csv has a run with another result; the page says that there is none")
    kills = {
        name: results.row("faults", study=f"kills of {what}")
        for name, what in {"fit": "fit", "vae": "VAE training"}.items()
    }
    return {
        **{f"{name}_kills": f"{row['trials']}" for name, row in kills.items()},
        **{f"{name}_runs": f"{row['runs']:.0f}" for name, row in kills.items()},
        "flips": f"{flips['trials']:,}",
        "refused": f"{flips['refused']:,}",
        "harmless": f"{flips['identical']:.0f}",
        "disks": f"{results.row('faults', study='full disks')['trials']}",
        "fits": f"{fits['trials']}",
        "growth": f"{max(0.0, fits['kib_per_fit']):.0f}",
        "entries": f"{fits['new_entries']:.0f}",
    }


PAGES = (reliability, speed, large, posteriordb, race, amortized, vae_posteriors, vlae)


def read_numbers(folder: Path = BENCHMARKS / "results") -> dict[str, Numbers]:
    """Return the numbers of every page, as text."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    results = Results(folder)
    return {page.__name__: page(results) for page in PAGES}
