# cirloop with CUDA. Build: docker build -t cirloop .   Run: docker run --gpus all -v "$PWD:/work" cirloop train --fast_mode
# Not built yet: there was no Docker where it was written (docs/install.md).
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml LICENSE README.md /src/
COPY src /src/src
COPY configs /src/configs
# The wheels of torch bring the CUDA libraries that they are built for.
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir '/src[train,xlsx]'

ENV PATH=/venv/bin:$PATH HF_HOME=/work/.cache/huggingface
WORKDIR /work
ENTRYPOINT ["cirloop"]
CMD ["--help"]
