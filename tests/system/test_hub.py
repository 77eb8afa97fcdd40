"""Weights of timm from a server that answers as the Hugging Face Hub does, and from one that does not."""

import http.server
import os
import subprocess
import sys
import threading

import safetensors.torch
import timm

from tests.support import Hub

FETCH = """
import sys, time
import parchgrad as pg
from parchgrad.errors import WeightsError

def sleep(seconds):
    raise AssertionError("tried again")

time.sleep = sleep
for line in sys.stdin:
    try:
        print(float(sum(values.double().sum() for values in pg.load_model(line.strip()).model.state_dict().values())))
    except WeightsError as error:
        print(error)
    sys.stdout.flush()
"""


def test_weights_of_timm_come_from_a_hub_that_answers_and_fail_at_once_from_one_that_does_not(monkeypatch, tmp_path):
    network = timm.create_model("test_byobnet")
    monkeypatch.setattr(Hub, "weights", {"test_byobnet": safetensors.torch.save(network.state_dict())})
    wanted = float(sum(values.double().sum() for values in network.state_dict().values()))

    def fetch(process, name):
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        return process.stdout.readline()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        home = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", FETCH]
        with subprocess.Popen(command, env=os.environ | home, text=True, **pipes) as process:
            assert float(fetch(process, "test_byobnet") or process.communicate()[1]) == wanted
            assert "weights of test_resnet (404" in fetch(process, "test_resnet")
            broken = fetch(process, "test_vit")
            assert "weights of test_vit (" in broken
            assert "503" in broken
            assert len([line for line in Hub.asked if "test_vit." in line]) == 1
            server.shutdown()
            server.server_close()
            thread.join()
            # Nobody is there any more; what was fetched is.
            assert float(fetch(process, "test_byobnet")) == wanted
            assert "use efficientnet_lite0" in fetch(process, "test_resnet")
            process.stdin.close()
            assert process.wait(timeout=240) == 0
