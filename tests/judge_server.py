"""A judge for tests: an OpenAI-compatible server with scripted verdicts, which remembers what it was sent."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def verdict(text: str) -> str:
    """As the prompts of lmms-eval's MathVista, MathVerse and HallusionBench want it."""
    if text.rstrip().endswith("Extracted answer:"):
        return "7"
    if "Reference answer:" in text:
        return "correct" if "Reference answer: Yes" in text else "incorrect"
    return "1" if "Is it right?" in text else "0"


@contextmanager
def judge_server(answer=verdict, status=200):
    """Yields (url, requests): each request is (headers, body)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((dict(self.headers), self.path, body))
            content = answer(body["messages"][-1]["content"])
            message = {"role": "assistant", "content": content}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
            data = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status // 100 == 3:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
