"""The patch of `docs/deploy` that puts an object store below L1: valid, and as its page says."""

from __future__ import annotations

import re

from kvcache.profiles import load_profile
from tests.support import deployment_files
from tests.support.deployment_files import MANIFESTS, OBJECT_STORE_PATCH, Value
from tests.test_deploy import SECRET, validate


def environment_by_name(deployment: Value) -> dict[str, Value]:
    """Remove the variables of a Deployment's first container, and return them by name."""
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    return {entry["name"]: entry for entry in container.pop("env")}


def test_object_store_patch_changes_variables_alone() -> None:
    patched = deployment_files.patched_deployment(MANIFESTS[0], OBJECT_STORE_PATCH)
    validate(patched)
    before = deployment_files.objects(MANIFESTS[0])[0]
    old, new = environment_by_name(before), environment_by_name(patched)
    assert before == patched
    assert {name: old[name] for name in old if old[name] != new[name]}.keys() == {"KVCACHE_PROFILE"}


def test_object_store_patch_sets_a_profile_with_the_credentials_of_the_secret() -> None:
    patched = deployment_files.patched_deployment(MANIFESTS[0], OBJECT_STORE_PATCH)
    environ = deployment_files.container_of(patched, SECRET).environment
    profile = load_profile(environ=environ)
    assert profile.name == "l1-object"
    options = profile.tiers[1].options
    for name in ("access_key_env", "secret_key_env"):
        assert environ[str(options[name])] == SECRET
    text = OBJECT_STORE_PATCH.read_text(encoding="utf-8")
    used = re.findall(r"secretKeyRef:\n +name: (\S+)\n +key: (\S+)", text)
    [command] = re.findall(r"kubectl create secret generic (.*)", text)
    assert {name for name, _ in used} == {command.split()[0]}
    assert [key for _, key in used] == re.findall(r"--from-literal=([\w-]+)=", command)
