"""Two hosts for real: two network namespaces with a cable between them, and a `torchrun` in each (gloo)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
ROOT = Path(__file__).parent.parent
# In a network namespace of its own: makes a second one, a pair of joined devices, and an address at either end.
CABLE = """
set -e
ip link set lo up
exec 3< <(exec unshare --net sh -c 'echo $$; exec sleep 120 >&2')
read -r -u 3 other
trap 'kill "$other"' EXIT
ip link add left type veth peer name right netns "$other"
ip address add 10.77.0.1/24 dev left
ip link set left up
there() { nsenter --target "$other" --net "$@"; }
there ip link set lo up
there ip address add 10.77.0.2/24 dev right
there ip link set right up
"""
# Arguments: python, and the script with its own. A name tells neither host its address, so they are told.
HOSTS = """
run=("$1" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400)
GLOO_SOCKET_IFNAME=right there "${run[@]}" --rdzv-conf is_host=0 --local-addr 10.77.0.2 "${@:2}" &
GLOO_SOCKET_IFNAME=left "${run[@]}" --rdzv-conf is_host=1 --local-addr 10.77.0.1 "${@:2}"
wait $!
ip -s -j link show left
"""


def shell(private, script, *arguments, seconds=60):
    """Run a script in a network namespace of its own: exit status, output, errors."""
    # no GPU: both hosts would be given the same one
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*private, "bash", "-c", script, "-", *arguments], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGTERM)
        output, errors = running.communicate()
        errors += f"\nstopped after {seconds} seconds"
    return running.returncode, output, errors


@pytest.fixture(scope="module")
def private():
    """How to enter a network namespace of one's own, here; without one the tests are skipped, with the reason."""
    for tool in ("unshare", "nsenter", "ip", "bash"):
        if not shutil.which(tool):
            pytest.skip(f"two hosts: no `{tool}` here")
    refused = []
    for way in (["unshare", "--map-root-user", "--net"], ["unshare", "--net"]):
        status, _, errors = shell(way, CABLE, seconds=20)
        if not status:
            return way
        refused.append(f"`{' '.join(way)}` and a pair of veth: {errors.strip()}")
    pytest.skip("two hosts: " + "; ".join(refused))


@pytest.mark.parametrize(
    "script", [("examples/distributed_step.py", "--check", "--steps", "8"), ("tests/hosts_step.py",)]
)
def test_loss_and_gradients_of_two_hosts_are_those_of_one_process(private, script):
    status, output, errors = shell(private, CABLE + HOSTS, sys.executable, *script)
    assert status == 0, errors[-4000:]
    *told, cable = output.strip().splitlines()
    assert "loss and gradients are those of one process" in told
    assert json.loads(cable)[0]["stats64"]["rx"]["bytes"] > 100_000  # the features went through the cable
