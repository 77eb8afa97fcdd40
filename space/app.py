"""The explorer as a public demo, for Hugging Face Spaces.

python space/app.py
"""

import os
import threading

from parchgrad.explorer.server import serve
from parchgrad.explorer.settings import WebSettings

SETTINGS = WebSettings(
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    # Anyone may come: small files, few waiting requests, and no other networks than those that need no download.
    max_megabytes=5,
    max_megapixels=12,
    max_stored_megabytes=500,
    any_network=False,
    max_waiting=20,
    max_sessions=50,
    # The site shows the page in a frame.
    frame_ancestors="https://huggingface.co",
)

if __name__ == "__main__":
    with serve(SETTINGS) as url:
        print(f"Serving {url}", flush=True)
        threading.Event().wait()
