"""What a real private run starts and opens: no more than it needs, and nothing to others without its token."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.toy import toy_config, toy_dataset

pytestmark = pytest.mark.ray

# Pages of numbers that Ray serves to whoever asks on this machine; see docs/security.md.
OPEN_PORTS = (44217, 44227)

# Runs as a user would, in token mode, and looks at itself from outside when the workers train.
PROGRAM = """
    import json, os, signal, stat, sys
    from contextlib import suppress
    from pathlib import Path
    import grpc, psutil, requests
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from hrm_ray.config.schema import TrainConfig
    from hrm_ray.training import ray_train, launch

    def cmdline(process):
        "Nothing of one that has ended meanwhile, as idle workers of Ray do."
        with suppress(psutil.NoSuchProcess):
            return " ".join(process.cmdline())
        return ""

    def connections(process):
        with suppress(psutil.NoSuchProcess):
            return process.net_connections(kind="inet")
        return []

    def listening(processes):
        for process in processes:
            for c in connections(process):
                if c.status == psutil.CONN_LISTEN or (c.type == 2 and c.laddr):
                    yield [c.laddr.ip.removeprefix("::ffff:"), c.laddr.port, cmdline(process)[:40]]

    def answers(port):
        "What a stranger gets: as Ray's own client without a token, and as a browser."
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)])
        stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        request = gcs_service_pb2.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
        try:
            stub.InternalKVGet(request, timeout=5)
            said = ["OK"]
        except grpc.RpcError as error:
            said = [error.code().name]
        for path in ("/", "/metrics", "/api/version", "/logs"):
            try:
                page = requests.get(f"http://127.0.0.1:{port}{path}", timeout=5, proxies={"http": None})
                said.append(page.status_code)
            except requests.RequestException:
                said.append(None)
        return said

    class Looks(launch.Driver):
        found = None
        def progress(self, progress):
            if self.found is None and progress.step >= 3:
                me = psutil.Process()
                family = [me, *me.children(recursive=True)]
                # Before anything that takes longer, in which the run may end.
                processes = " ".join(map(cmdline, family))
                sockets = list(listening(family))
                import ray
                session = Path(ray._private.worker._global_node.get_session_dir_path())
                Looks.found = {
                    "sockets": sockets,
                    "answers": {port: answers(port) for _, port, _ in sockets},
                    "processes": processes,
                    "workers": self.num_workers,
                    "groups": len(list(session.glob("store-*"))),
                    "mode": stat.S_IMODE(session.parent.parent.stat().st_mode),
                    "folder": str(session.parent.parent),
                }
                self.stop.signal = signal.SIGINT  # it has been seen

    config = TrainConfig(**json.loads(sys.argv[1]))
    ray_train.train_on_ray(config, launch.run_folder(config), Looks(config))
    print(json.dumps(Looks.found))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_private_run_listens_on_loopback_alone_and_to_its_token(tmp_path, num_workers):
    toy_dataset(tmp_path / "data", num_train=59, num_identifiers=5)
    scaling = {"mode": "ray", "num_workers": num_workers, "cpus_per_worker": 1}
    config = toy_config(tmp_path / "data", tmp_path / "runs", scaling=scaling, max_steps=600, epochs=300)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    environment |= {"HOME": "/proc/none", "GLOO_SOCKET_IFNAME": "eth0"}  # a home that cannot be written
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps(config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["workers"] == num_workers and found["groups"] == (num_workers > 1)
    assert "ray::Controller" in found["processes"] and "RayTrainWorker" in found["processes"]
    # Ray Train's helpers, which would start while the workers do.
    for helper in ("PlacementGroupCleaner", "DatasetManager", "PreemptionWatcher", "AutoscalingCoordinator"):
        assert helper not in found["processes"]
    assert len(found["sockets"]) > 5
    assert [s for s in found["sockets"] if not s[0].startswith("127.") and s[0] != "::1"] == []
    assert 52365 not in [port for _, port, _ in found["sockets"]]  # the agent's, which a head needs for jobs
    for port, (as_ray, *as_browser) in found["answers"].items():
        assert as_ray != "OK", (port, found["sockets"])
        assert int(port) in OPEN_PORTS or 200 not in as_browser, (port, as_browser, found["sockets"])
    assert found["mode"] == 0o700 and not Path(found["folder"]).exists()
