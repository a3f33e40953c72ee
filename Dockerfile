# The page of scripts.app, and scripts.predict, on a CPU. The model is a folder that is mounted as /model.
#
#   docker build -t hierarchical-roberta .
#   docker run --rm -p 127.0.0.1:7860:7860 -v $PWD/outputs/run:/model:ro hierarchical-roberta
#   docker run --rm -i -v $PWD/outputs/run:/model:ro hierarchical-roberta python -m scripts.predict --model /model < story.txt
#
# .ci/check_dockerfile.py executes what follows without Docker.
FROM python:3.12-slim

# For x86-64, PyPI has torch with CUDA (gigabytes that a CPU does not need); --build-arg TORCH_INDEX=URL takes it from
# PyTorch's index of CPU builds.
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

WORKDIR /app
# Older releases take no hashes from a constraints file (pypa/pip#9243).
RUN python -m pip install pip==26.3
RUN ${TORCH_INDEX:+env PIP_INDEX_URL="$TORCH_INDEX"} python -m pip install torch==2.13.0
COPY requirements.lock ./
# Only what the two commands import, with dependencies, pinned and hashed by the lock.
RUN python -m pip install --require-hashes --constraint requirements.lock \
  accelerate charset-normalizer datasets gradio joblib psutil scipy transformers \
  mammoth onnxruntime pypdfium2 pysubs2 python-calamine
COPY data data/
COPY modeling modeling/
COPY scripts scripts/

# The home of whoever runs it, for what is downloaded from the Hub; writable for any user (docker run --user).
RUN mkdir -m 1777 /cache
ENV HOME=/cache HF_HOME=/cache/huggingface LOGNAME=app
USER 1000
VOLUME /cache

EXPOSE 7860
HEALTHCHECK --start-period=2m CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860', timeout=9)"
CMD ["python", "-m", "scripts.app", "--model", "/model", "--host", "0.0.0.0"]
