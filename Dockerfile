# Not run with Docker: written on a machine without it. tests/proof/test_dockerfile.py runs its steps.
#   docker build -t deepseek-fp4 .                                                                        CPU
#   docker build -t deepseek-fp4 --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 .     CUDA
#   docker run -p 8000:8000 deepseek-fp4                                            (CUDA: add --gpus all --shm-size 8g)

# The compiler stays here: the image gets the wheel with its native kernels.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY native ./native
COPY deepseek_fp4_plugin ./deepseek_fp4_plugin
RUN pip wheel --no-cache-dir --no-deps -C wheel.cmake=true -w /wheels .

FROM python:3.12-slim
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch==2.13.0 --index-url "$TORCH_INDEX_URL"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && useradd --create-home server

USER server
WORKDIR /home/server
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=10m CMD python -c "import urllib.request as u; u.urlopen('http://localhost:8000/health')"
ENTRYPOINT ["deepseek-fp4", "serve", "--host", "0.0.0.0"]
CMD ["r1_nano", "--mtp", "3", "--reasoning_parser", "deepseek-r1-0528", "--tool_parser", "deepseek_v3"]
