"""A service of the family: an app factory, the model kept in a class, parsing in a function of its own."""

import argparse
import json
import threading

import mlx_vlm as vlm
from flask import Flask, request


class AdvisorModel:
    def __init__(self, name, max_tokens):
        self.name, self.max_tokens = name, max_tokens
        self.lock = threading.RLock()
        self.loaded = None

    def get(self):
        with self.lock:
            if self.loaded is None:
                self.loaded = vlm.load(self.name)
            return self.loaded

    def run_model_mlx(self, full_prompt, image_path=None, verbose=False):
        with self.lock:
            model, processor = self.get()
            prompt = vlm.apply_chat_template(processor, model.config, full_prompt, num_images=1)

            def ask():
                return vlm.generate(
                    model, processor, prompt, [image_path], max_tokens=self.max_tokens, temperature=0.0, verbose=verbose
                )

            return ask().text


def create_app(options):
    app = Flask(__name__)
    advisor_model = AdvisorModel(options.mlx_model, options.max_tokens)

    @app.route("/health")
    def health():
        return {"status": "healthy"}

    @app.route("/analyze", methods=["POST"])
    def analyze():
        fields = request.form.to_dict()
        path = f"upload-{threading.get_ident()}.jpg"
        request.files["image"].save(path)
        if True:
            try:
                advisor_id = fields["advisor"]
                identifier = fields.get("jobId", fields.get("job_id"))
                with open("prompts.json") as file:
                    prompt = json.load(file)[advisor_id]
                answer = advisor_model.run_model_mlx(prompt, image_path=path)
            except KeyError as error:
                return {"error": str(error)}, 400
        return {"job_id": identifier, "response": answer}

    return app


def parse_arguments():
    parser = argparse.ArgumentParser(description="advisor")
    parser.add_argument("--port", type=int, default=5100)
    parser.add_argument("--mlx_model", default="mlx-community/Qwen3-VL-4B-Instruct-4bit")
    parser.add_argument("--max_tokens", type=int, default=1500)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_arguments()
    app = create_app(options)
    if options.port < 1024:
        app.run(host="0.0.0.0", port=options.port)
    else:
        app.run(host="127.0.0.1", port=options.port, threaded=True)
