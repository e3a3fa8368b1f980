"""The routes; each analysis is the strategy's of its mode."""

import sqlite3

from flask import Blueprint, jsonify, request
from strategies import AnalysisContext

blueprint = Blueprint("advisor", __name__)


@blueprint.route("/health")
def health():
    return jsonify(status="UP")


@blueprint.route("/analyze", methods=["POST"])
def analyze():
    advisor, job_id = request.form["advisor"], request.form["job_id"]
    path = f"{job_id}.jpg"
    request.files["image"].save(path)
    with sqlite3.connect("mondrian.db", timeout=30) as db:
        db.execute("INSERT INTO jobs (id, advisor, status) VALUES (?, ?, 'done')", (job_id, advisor))
    return jsonify(response=AnalysisContext(request.form.get("mode", "baseline")).analyze(path, advisor))
