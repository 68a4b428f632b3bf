"""One simulation as a file of its own: a page with just the section on prefetching, or a picture of its sweeps."""

from pathlib import Path

from analysis.images import FORMATS, check_image, write_image
from analysis.page import render
from analysis.sections import prefetching
from analysis.sections.prefetching_sweeps import sweeps_figure
from analysis.simulations import Simulation
from groundwork import atomic
from groundwork.errors import ConfigurationError
from groundwork.provenance import library_versions

SUFFIXES = (".html", *(f".{image_format}" for image_format in FORMATS))


def check_figure(output: Path, *, swept: bool = True) -> None:
    """Raise ConfigurationError where `output` could not be written, so that it is known before any work.

    A picture shows what the sweep finds, and needs one; `swept` says whether there will be.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigurationError(f"--figure {output}: ends in {output.suffix!r}, wanted one of {', '.join(SUFFIXES)}")
    if output.is_dir():
        raise ConfigurationError(f"--figure {output}: is a folder, wanted a file to write; name another")
    if output.suffix == ".html":
        return
    if not swept:
        raise ConfigurationError(
            f"--figure {output}: a picture shows other cache sizes and links, which --sweep_tokens 0 leaves out; "
            "leave that away, or name an .html file"
        )
    check_image(output)


def write_figure(simulation: Simulation, output: Path) -> None:
    """Write what `simulate` returned to `output`: an .html page, or an .svg, .png or .pdf.

    Raises ConfigurationError as `check_figure` does.
    """
    check_figure(output, swept=bool(simulation["sweep"]))
    if output.suffix != ".html":
        settings = simulation["machine"]
        source = f"{simulation['model']}, {settings['precision']}, {settings['expert_bytes'] / 1e6:.3g} MB an expert"
        write_image(sweeps_figure(simulation), output, source)
        return
    run = {
        "model_name": simulation["model"],
        "num_experts": simulation["model_profile"]["num_experts"],
        "hardware": simulation["hardware"]["name"],
        "cache_experts": simulation["machine"]["cache_experts"],
        "experts": simulation["machine"]["experts"],
        "tokens": simulation["tokens"],
        "sequences": simulation["sequences"],
        "report_versions": library_versions(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(output, render([prefetching.make([simulation])], run, "simulation.html.j2"))
