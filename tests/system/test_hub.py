"""Weights of timm from a server that answers as the Hugging Face Hub does, and from one that does not."""

import http.server
import json
import os
import pickle
import subprocess
import sys
import threading

import safetensors.torch
import timm

from tests.support import Hub

FETCH = """
import sys, time
import parchgrad as pg
from parchgrad.errors import ModelError, WeightsError

def sleep(seconds):
    raise AssertionError("tried again")

time.sleep = sleep
for line in sys.stdin:
    try:
        print(float(sum(values.double().sum() for values in pg.load_model(line.strip()).model.state_dict().values())))
    except (ModelError, WeightsError) as error:
        print(error)
    sys.stdout.flush()
"""


def repository(name, **files):
    """Make the files of a repository, by the paths under which the Hub serves them."""
    config = {"architecture": "test_byobnet", "num_classes": 1000, "pretrained_cfg": {"first_conv": "stem.conv"}}
    held = {"config.json": json.dumps(config).encode(), **files}
    return {f"/{name}/resolve/main/{file}": content for file, content in held.items() if content is not None}


class Refused:
    """Its pickle would end the process that reads it."""

    def __reduce__(self):
        return (os._exit, (1,))


def test_weights_of_timm_come_from_a_hub_that_answers_and_fail_at_once_from_one_that_does_not(monkeypatch, tmp_path):
    network = timm.create_model("test_byobnet")
    monkeypatch.setattr(Hub, "weights", {"test_byobnet": safetensors.torch.save(network.state_dict())})
    wanted = float(sum(values.double().sum() for values in network.state_dict().values()))
    ours = {name: values * 2 if values.is_floating_point() else values for name, values in network.state_dict().items()}
    of_ours = float(sum(values.double().sum() for values in ours.values()))
    files = repository("someone/ours", **{"model.safetensors": safetensors.torch.save(ours)})
    files |= repository("someone/pickled", **{"pytorch_model.bin": pickle.dumps(Refused())})
    files |= repository("someone/other", **{"config.json": b"{}"})
    files |= repository("someone/empty", **{"config.json": None, "README.md": b""})
    monkeypatch.setattr(Hub, "files", files)

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
            assert float(fetch(process, "hf-hub:someone/ours")) == of_ours
            assert "has no model.safetensors" in fetch(process, "hf-hub:someone/pickled")
            assert not any("pytorch_model.bin" in line for line in Hub.asked if "someone" in line)
            assert "its config.json names no architecture" in fetch(process, "hf-hub:someone/other")
            assert "it has no config.json" in fetch(process, "hf-hub:someone/empty")
            assert "no public repository 'someone/missing'" in fetch(process, "hf-hub:someone/missing")
            server.shutdown()
            server.server_close()
            thread.join()
            # Nobody is there any more; what was fetched is.
            assert float(fetch(process, "test_byobnet")) == wanted
            assert float(fetch(process, "hf-hub:someone/ours")) == of_ours
            assert "use efficientnet_lite0" in fetch(process, "test_resnet")
            assert "use efficientnet_lite0" in fetch(process, "hf-hub:someone/elsewhere")
            process.stdin.close()
            assert process.wait(timeout=240) == 0
