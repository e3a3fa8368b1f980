"""A service of the family in several modules: settings from the environment, the view and the model elsewhere."""

import os

from flask import Flask
from views import blueprint

app = Flask(__name__)
app.register_blueprint(blueprint)

if __name__ == "__main__":
    app.run(host="127.0.0.1", port=int(os.environ.get("PORT", "5100")), threaded=True)
