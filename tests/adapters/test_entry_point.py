"""Somebody else's adapter, installed as a package of its own, without a change in herdkit."""

import subprocess
import sys
from pathlib import Path

THIRD_PARTY = Path(__file__).parent.parent / "third_party" / "depth_adapter.py"

PROGRAM = """
import sys, torch, herdkit
from herdkit.adapters import adapter_class, adapter_names, compose
from herdkit.text import Tokenizer, Transformer, TransformerConfig

assert "depth" in adapter_names()
Depth = adapter_class("depth")
tokenizer = Tokenizer.train(["how far is it two metres"], 514)
config = TransformerConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=tokenizer.vocab_size)
torch.manual_seed(0)
model = compose(Transformer(config), tokenizer, depth=Depth(Depth.config_class(), config))
ask = lambda model, depth: model.chat(
    [{"role": "user", "content": [{"type": "depth", "depth": depth}, {"type": "text", "text": "how far"}]}],
    max_new_tokens=8, temperature=1.0, seed=3)
near = ask(model, "1 2 3")
herdkit.save(model, sys.argv[1])
assert ask(herdkit.load(sys.argv[1]), "1 2 3") == near
assert ask(model, "900 800 -700 3 3 3") != near
print("depth works")
"""


def test_an_adapter_from_outside_plugs_in_through_its_entry_point(tmp_path):
    site = tmp_path / "site"
    info = site / "depth_adapter-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "depth_adapter.py").write_text(THIRD_PARTY.read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: depth-adapter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[herdkit.adapters]\ndepth = depth_adapter:DepthAdapter\n")
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model")],
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "depth works"


def test_the_example_is_as_short_as_the_readme_says():
    lines = [line for line in THIRD_PARTY.read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
