# segkit as `make setup` installs it, in an environment of its own: `docker build --tag segkit .`
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home segkit
WORKDIR /opt/segkit
COPY --chown=segkit . .
RUN chown segkit .
USER segkit
RUN make setup
ENV PATH=/opt/segkit/.venv/bin:$PATH
ENV NO_ALBUMENTATIONS_UPDATE=1
ENTRYPOINT ["segkit"]
CMD ["--help"]
