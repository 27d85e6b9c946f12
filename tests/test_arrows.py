"""Imports only point down; serving and training never meet; big libraries have few doors.

One ordered list: a file may import what stands before it in its own package, and `service` and
`training` may import all of `elastiformer`. A file that is not in the list has no place yet.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from elastiformer import kernels

ROOT = Path(__file__).resolve().parent.parent

LOW_TO_HIGH = """
    elastiformer: errors tasks whole_files text_bounds capacity usage accounting calibration
        calibration_reading card priced families encoder_families encoders experts routers lora
        lora_files unpacking shipped originals weights encoder_weights vlms vlm_weights misfits
        adapter_files adapter saved_adapter kernels thresholds plan_grid masked pool cache
        stretches sequence imaged prefixes memory spare_rows row_kernels vectors class_kernels
        pointwise allowances device_allowances packed rotary taken costs stored_tile lanes largest
        pairs amx tile_blocks many_queries whole_requests blocks tail_kernels paired_queries
        single_queries sub_layers tiles
        readings products flop_formulas expert_table repair mending sides attention both_ways
        placing workshop keeping direct_reading sparse_heads sparse_attention sparse_experts
        sparse_mlp tail_weights tail_calls class_tail decoding device_kernels device_attention
        device_prompt_attention device_taking device_prompt_layers device_prompts
        device_decoding
        late_keys late_layers sparse encoding imaging sight planning drawing sampling inputs images
        encoder_inputs picture_inputs elastic model sharded led vlm encoder __init__

    service: __init__ errors build hosts settings schemas scheduler pace metrics load knob orders
        fetching energy rows bench ledger outputs middleware engine encoder_engine led served
        zero_shot items reach desk tracing logs answers readings streams routes app server __main__

    training: __init__ files options signals progress processes packages data start stream examples
        exchanges choosers image_draws losses quality lessons student encoder_student
        picture_student checkpoint mixed fitting fashion_mnist convolutions neighbours vision
        masked_images reviews canvases corpora sentiment canvas_tower canvas_sets canvas_answers
        canvas_model build encoder_quality picture_quality allotment tuning
        sensitivity regression picking channel_choices channel_sizes learnt ablation_rows
        baselines repaired pictures stopwatch reports encoder_reports loop encoder_calibrate
        encoder_evaluate path_search lent_paths picture_reports picture_evaluate
        picture_meter picture_calibrate overlap subjects domain_data domain_report
        recipe_report ablation_report learners distill repair ranks ablation calibrate
        evaluate ablate domains recipe reconstruct summarize goals seeds synthesize __main__
"""

_COMPILED = {
    f"elastiformer.{name}"
    for name in (
        "amx",
        "blocks",
        "class_kernels",
        "kernels",
        "lanes",
        "largest",
        "late_keys",
        "many_queries",
        "paired_queries",
        "pairs",
        "row_kernels",
        "single_queries",
        "stored_tile",
        "sub_layers",
        "tail_kernels",
        "thresholds",
        "tile_blocks",
        "vectors",
        "whole_requests",
    )
}

# library: the only files that may import it. A package stands for all its files.
DOORS = {
    "transformers": {
        "elastiformer.elastic",
        "elastiformer.encoder",
        "elastiformer.encoder_weights",
        "elastiformer.encoders",
        "elastiformer.encoding",
        "elastiformer.families",
        "elastiformer.lora",
        "elastiformer.model",
        "elastiformer.vlm",
        "elastiformer.vlm_weights",
        "elastiformer.vlms",
        "elastiformer.weights",
        "training.canvas_answers",
        "training.canvas_model",
        "training.canvas_tower",
        "training.choosers",
        "training.data",
        "training.encoder_evaluate",
        "training.stream",
        "training.evaluate",
        "training.masked_images",
        "training.mixed",
        "training.picture_evaluate",
        "training.reconstruct",
        "training.sentiment",
        "training.vision",
    },
    "peft": {"elastiformer.lora_files"},
    "huggingface_hub": {"elastiformer.adapter_files", "elastiformer.weights"},
    "gguf": set(),  # Transformers reads GGUF with it
    "datasets": {"training.data", "training.examples"},
    "PIL": {"elastiformer.images"},
    "numba": _COMPILED,
    "llvmlite": _COMPILED - {"elastiformer.kernels", "elastiformer.tail_kernels"},
    "triton": {
        "elastiformer.device_attention",
        "elastiformer.device_kernels",
        "elastiformer.device_prompt_attention",
    },
    "matplotlib": {"training.pictures", "training.progress"},
    "fastapi": {"service"},
    "httpx": {"service.fetching"},
    "opentelemetry": {"service.tracing"},
    "pynvml": {"service.energy"},
    "fastapi_offline": {"service.app"},
    "starlette": {"service"},
    "uvicorn": {"service.server"},
    "pydantic": {"service"},
    "pydantic_settings": {"service"},
    "prometheus_client": {"service"},
    "torchvision": set(),
}

# Files that know no tensor, and import no file of ours that does.
WITHOUT_TORCH = {
    "elastiformer": "errors tasks whole_files text_bounds capacity usage accounting calibration "
    "calibration_reading card inputs",
    "service": "errors build hosts settings scheduler pace metrics load knob middleware zero_shot",
    "training": "files signals packages allotment",
}


def places() -> dict[str, int]:
    """Every module with its place in the list."""
    found: dict[str, int] = {}
    package = ""
    for word in LOW_TO_HIGH.split():
        if word.endswith(":"):
            package = word[:-1]
        else:
            found[package if word == "__init__" else f"{package}.{word}"] = len(found)
    return found


PLACES = places()
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("elastiformer", "service", "training")
    for path in sorted((ROOT / package).glob("**/*.py"))
}


def imports(path: Path) -> set[str]:
    """What a file imports, by full name; for `from package import name`, the module if it is one.

    What stands under `if TYPE_CHECKING:` or inside a function counts too: an arrow is an arrow.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def test_every_file_has_a_place_and_every_place_a_file():
    assert set(PLACES) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_stands_below_it(module):
    package = module.partition(".")[0]
    above = {
        other
        for other in IMPORTS[module] & set(MODULES)
        if other.partition(".")[0] != package
        or PLACES.get(other, 0) >= PLACES.get(module, len(PLACES))
    }
    if package != "elastiformer":
        above = {other for other in above if other.partition(".")[0] != "elastiformer"}
    assert not above, f"{module} imports {sorted(above)}"


@pytest.mark.parametrize("library", DOORS)
def test_a_big_library_comes_in_through_its_own_doors(library):
    users = {
        module
        for module, found in IMPORTS.items()
        if any(name.partition(".")[0] == library for name in found)
    }
    strays = {user for user in users if not {user, user.partition(".")[0]} & DOORS[library]}
    assert not strays


def test_a_file_without_torch_meets_none_on_any_way():
    pure = {
        f"{package}.{name}" for package, names in WITHOUT_TORCH.items() for name in names.split()
    }
    assert pure <= set(MODULES)
    for module in pure:
        others = {name for name in IMPORTS[module] if name in MODULES}
        assert others <= pure, f"{module} imports {sorted(others - pure)}"
        assert not {name for name in IMPORTS[module] if name.partition(".")[0] == "torch"}, module


def test_a_change_of_any_compiled_file_compiles_all_anew():
    found = {
        module
        for module, path in MODULES.items()
        if "\n@compiled(" in path.read_text(encoding="utf-8")
        or {name.partition(".")[0] for name in IMPORTS[module]} & {"numba", "llvmlite"}
    }
    assert found == {f"elastiformer.{name.removesuffix('.py')}" for name in kernels._FILES}


def test_the_library_exports_what_it_says():
    import elastiformer

    public = {name for name in vars(elastiformer) if not name.startswith("_")}
    submodules = {module.partition(".")[2] for module in MODULES if "elastiformer." in module}
    assert public - submodules == set(elastiformer.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_a_room_that_opens_by_saying_what_happens_there(module):
    text = MODULES[module].read_text("utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 500
