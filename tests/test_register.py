"""``import rrsq`` is light, and still makes transformers understand the format."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_transformers() -> None:
    heavy = run(
        "import sys, rrsq\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'triton', 'numpy') if m in sys.modules])"
    )
    assert heavy == "[]"


def test_importing_twice_installs_each_hook_once() -> None:
    waiting = run(
        "import sys, rrsq, rrsq._register as r; r.register();"
        "print(sorted(f.name for f in sys.meta_path if type(f).__name__ == '_RegistryFinder'))"
    )
    assert waiting == "['peft.tuners.lora', 'transformers.quantizers.auto']"


def test_the_method_is_registered_as_soon_as_transformers_has_a_registry() -> None:
    found = run(
        "import sys, rrsq\n"
        "from transformers.quantizers import auto\n"
        "left = [f.name for f in sys.meta_path if 'rrsq' in type(f).__module__]\n"
        "print('rrsq' in auto.AUTO_QUANTIZER_MAPPING, 'rrsq' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING, left)"
    )
    assert found == "True True ['peft.tuners.lora']"


def test_lora_is_registered_whichever_is_imported_first() -> None:
    for imports in ("import rrsq, peft", "import peft, rrsq"):
        found = run(f"{imports}; print([k.__name__ for k in peft.LoraConfig()._custom_modules])")
        assert found == "['QuantizedLinear']"
