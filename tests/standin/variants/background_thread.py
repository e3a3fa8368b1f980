"""A service of the family: answers 202 at once and works in a thread; imports within functions, a whole-row insert."""
import argparse, os, sqlite3, threading, uuid
from flask import Flask, request, jsonify
try:
    import numpy
except ImportError:
    numpy = None

app = Flask("advisor")
parser = argparse.ArgumentParser()
parser.add_argument('--port', default=5100, type=int); parser.add_argument('--mlx_model', default='mlx-community/Qwen3-VL-4B-Instruct-4bit')
parser.add_argument('--max_tokens', type=int, default=1500)
args = parser.parse_args()
DATABASE = os.path.join(os.getcwd(), 'mondrian.db')
model = None; processor = None

def get_mlx_model():
    global model, processor
    if model is None:
        from mlx_vlm.utils import load
        model, processor = load(args.mlx_model)   # slow the first time
    return model, processor

def run_model_mlx(full_prompt, image_path):
    from mlx_vlm import generate, apply_chat_template
    m, p = get_mlx_model()
    formatted = apply_chat_template(p, m.config, full_prompt, num_images=1)
    result = {}
    def work():
        result['text'] = generate(m, p, formatted, image=image_path, max_tokens=args.max_tokens, temperature=0.0).text
    t = threading.Thread(target=work, daemon=True)
    t.start()
    t.join(120)
    if t.is_alive():
        raise TimeoutError('model timed out')
    return result['text']

def process_job(job, advisor, path, prompt):
    text = run_model_mlx(prompt, path)
    db = sqlite3.connect(DATABASE, timeout=30)
    with db:
        db.execute("INSERT OR REPLACE INTO jobs (id, advisor, status, analysis_markdown) VALUES (?, ?, 'completed', ?)", (job, advisor, text))
    db.close()

@app.route('/health')
def health(): return jsonify({'status': 'ok'})

@app.route('/analyze', methods=['POST'])
def analyze():
    f = request.files['image']; path = os.path.join(os.getcwd(), uuid.uuid4().hex + '.jpg'); f.save(path)
    job_id = request.form.get('job_id')
    if not job_id:
        job_id = str(uuid.uuid4())
    advisor = request.form['advisor']
    db = sqlite3.connect(DATABASE, timeout=30)
    system = db.execute("SELECT value FROM config WHERE key='system_prompt'").fetchone()[0].replace('<AdvisorName>', advisor)
    prompt = system + '\n\n' + db.execute("SELECT prompt FROM advisors WHERE id=?", (advisor,)).fetchone()[0] + '\n\nAnalyze the provided image.'
    with db: db.execute("INSERT OR REPLACE INTO jobs (id, advisor, status) VALUES (?, ?, 'queued')", (job_id, advisor))
    db.close()
    threading.Thread(target=process_job, args=(job_id, advisor, path, prompt)).start()
    return jsonify({'job_id': job_id, 'status': 'accepted'}), 202

if __name__ == '__main__': app.run(host='127.0.0.1', port=args.port, threaded=True)
