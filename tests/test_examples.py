import subprocess
from pathlib import Path

import pytest
import yaml
from herdkit.text.pretrain import PretrainRecipe
from herdkit.train import load_recipe

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def trainer_overrides(text):
    return [word for word in text.split() if word.startswith("trainer.")]


@pytest.mark.parametrize("path", ["slurm/train.sbatch", "kubernetes/train.yaml"])
def test_overrides_are_keys_of_recipes(path):
    overrides = trainer_overrides((EXAMPLES / path).read_text())
    assert overrides
    load_recipe(ROOT / "text" / "recipes" / "tiny_pretrain.yaml", PretrainRecipe, overrides)


def test_the_batch_script_is_one():
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm" / "train.sbatch")], check=True)


def test_the_parts_of_the_job_fit_each_other():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "train.yaml").read_text())
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    options = dict(word.split("=", 1) for word in container["command"] if word.startswith("--"))
    assert int(options["--nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(options["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    host, port = options["--rdzv-endpoint"].split(":")
    assert host == f"{name}-0.{pod['subdomain']}"
    assert [int(port)] == [entry["containerPort"] for entry in container["ports"]]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
