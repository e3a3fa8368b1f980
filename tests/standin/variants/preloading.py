#!/usr/bin/env python3
"""
A service of the family: a thread loads the model early, imports are guarded, answers are (text, thinking).
"""
import os, sys
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import json, time, uuid, sqlite3, argparse, traceback, threading
from pathlib import Path
from datetime import datetime
from flask import (
    Flask, request,
    jsonify, Response,
)
try:
    import mlx.core as mx
    import mlx_vlm
    from mlx_vlm import load as mlx_load, generate as mlx_generate
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import load_config
    MLX_AVAILABLE = True
except ImportError as e:
    MLX_AVAILABLE = False
    print(f"[WARN] MLX not available: {e}")

# ============================================================
# Arguments
# ============================================================
parser = argparse.ArgumentParser(description='AI Advisor Service',
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument('--port', type=int, default=5100)
parser.add_argument('--job_service_url', type=str, default='http://127.0.0.1:5005/job')
parser.add_argument('--model_timeout', type=int, default=120)
parser.add_argument('--mlx_model', type=str, default='mlx-community/Qwen3-VL-4B-Instruct-4bit')
parser.add_argument('--rag_service_url', type=str, default='http://127.0.0.1:5400')
parser.add_argument('--max_tokens', type=int, default=1500)
args, _ = parser.parse_known_args()

app = Flask(__name__)
MLX_MODEL = args.mlx_model
BASE_DIR = Path(__file__).resolve().parent
DB = str(BASE_DIR / "mondrian.db")
_mlx_cache = {"model": None, "processor": None, "config": None}
_mlx_lock = threading.RLock()


def get_mlx_model(force_reload: bool = False):
    """Get cached model."""
    with _mlx_lock:
        if force_reload or _mlx_cache["model"] is None:
            if not MLX_AVAILABLE:
                raise RuntimeError("MLX not installed")
            t0 = time.time()
            try:
                model, processor = mlx_load(MLX_MODEL, trust_remote_code=True)
            except Exception as exc:
                print(f"[ERROR] load failed: {exc}")
                raise
            _mlx_cache.update(model=model, processor=processor, config=load_config(MLX_MODEL))
            print(f"[INFO] model loaded in {time.time()-t0:.1f}s", flush=True)
    return _mlx_cache["model"], _mlx_cache["processor"]


def run_model_mlx(full_prompt: str, image_path: "str | None" = None, job_id=None,
                  max_tokens: int = args.max_tokens, temperature: float = 0.0) -> "tuple[str, str]":
    """Returns (markdown, thinking)."""
    thinking = ''
    model, processor = get_mlx_model()
    prompt = apply_chat_template(processor, _mlx_cache["config"], full_prompt, num_images=1 if image_path else 0)
    t = time.time()
    with _mlx_lock:
        result = mlx_generate(model, processor, prompt,
                              image=[image_path] if image_path else None,
                              max_tokens=max_tokens, temperature=temperature, verbose=False)
    text = result.text if hasattr(result, 'text') else str(result)
    if '</thinking>' in text:
        thinking, text = text.split('</thinking>', 1)
    print(f"[TIMING] {time.time()-t:.2f}")
    return text, thinking


def _load_prompts(advisor_id):
    con = sqlite3.connect(DB)
    con.row_factory = sqlite3.Row
    sysp = con.execute("SELECT value FROM config WHERE key=?", ("system_prompt",)).fetchone()["value"]
    row = con.execute("SELECT * FROM advisors WHERE id = ?", (advisor_id,)).fetchone()
    con.close()
    return sysp, row


def analyze_image(advisor: str, image_path: str, job_id: str, enable_rag: bool = False):
    sysp, row = _load_prompts(advisor)
    full = sysp.replace("<AdvisorName>", advisor) + "\n\n" + (row["prompt"] or "") + "\n\nAnalyze the provided image."
    return run_model_mlx(full, image_path=image_path, job_id=job_id)


@app.route('/health', methods=['GET'])
def health():
    return jsonify({'status': 'healthy', 'model': MLX_MODEL, 'mlx': MLX_AVAILABLE}), 200


@app.route('/analyze', methods=['POST'])
def analyze():
    try:
        if request.is_json:
            data = request.get_json()
        else:
            data = request.form
        requested = data.get('advisor') or 'ansel'
        advisor = requested.strip().lower()
        job = data.get('job_id', None)
        mode = data.get('mode', 'baseline')
        file = request.files.get('image')
        if not file:
            return jsonify({'error': 'image missing'}), 400
        tmp = BASE_DIR / f"tmp_{uuid.uuid4().hex}.jpg"
        file.save(str(tmp))
        try:
            md, thinking = analyze_image(advisor, str(tmp), job, data.get('enable_rag') == 'true')
        finally:
            tmp.unlink(missing_ok=True)
        return jsonify({'response': md, 'llm_thinking': thinking, 'advisor': advisor, 'mode': mode})
    except Exception as exc:
        traceback.print_exc()
        return jsonify({'error': str(exc)}), 500


if __name__ == '__main__':
    print(f"Starting on {args.port}")
    def preload():
        try:
            get_mlx_model()
        except Exception as exc:
            print(exc)
    threading.Thread(target=preload, daemon=True).start()
    app.run(host='0.0.0.0', port=args.port, debug=False, threaded=True)
