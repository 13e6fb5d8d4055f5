"""consilium-predict: the program of a hospital that uses a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from consilium_shared import console
from consilium_shared.errors import ConfigurationError
from consilium_shared.protocol import version as versions_of_formats

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Use a model in a hospital: check, add, serve. It is no diagnosis."
)
versions_of_formats.add_to(app)

HomeOption = Annotated[Path, typer.Option("--home", envvar="CONSILIUM_PREDICT_HOME", help="The service's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
FingerprintOption = Annotated[str, typer.Option("--fingerprint", help="The coordinator's, compared by telephone.")]
BundleArgument = Annotated[Path, typer.Argument(help="a bundle: folder or zip file")]
StudyArgument = Annotated[str, typer.Argument(help="name of the study")]
DEFAULT_HOME = Path("consilium-predict")


def say(text: str) -> None:
    """Print a line for people."""
    console.console.print(text, markup=False)


@app.command()
def check(bundle: BundleArgument, fingerprint: FingerprintOption, as_json: JsonOption = False) -> None:
    """Verify a bundle: signature, every file's digest, and its example's answer on this machine."""
    from consilium_serve.model import Model
    from consilium_shared.protocol.bundle import open_bundle

    found = open_bundle(bundle, fingerprint)
    model = Model(found)
    value: dict[str, Any] = {
        "study": model.study.study,
        "version": model.version,
        "model": model.sha256,
        "files": {name: file.sha256 for name, file in found.manifest.files.items()},
        **model.predictions.declared(),
    }
    if as_json:
        print(json.dumps(value, indent=2, sort_keys=True))
        return
    say(f"signed by the coordinator with this fingerprint; {len(found.files)} files are as they were signed")
    say(f"study {model.study.study}, version {model.version}: answers its example as the trained model did")


@app.command()
def init(fingerprint: FingerprintOption, home: HomeOption = DEFAULT_HOME) -> None:
    """Make the service's folder, with new keys and a predict.yaml to look at."""
    from consilium_serve.home import Home

    Home(home.resolve()).begin(fingerprint)
    say(f"{home}: look at predict.yaml; then add a bundle, make a token, and serve")


@app.command()
def add(bundle: BundleArgument, home: HomeOption = DEFAULT_HOME) -> None:
    """Verify a bundle and install it. A study's first version answers at once, a later one when it is activated."""
    from consilium_serve.home import Home
    from consilium_serve.versions import add as install

    versions, version, there = install(Home(home.resolve()), bundle)
    state = versions.state()
    role = "answers" if state.active == version else "does not answer yet: consilium-predict activate, or shadow"
    say(f"{versions.study} {version} {'was installed before' if there else 'is installed'}; it {role}")


@app.command()
def models(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the installed versions and what each does."""
    from consilium_serve.home import Home
    from consilium_serve.versions import Versions, studies

    place = Home(home.resolve())
    place.settings()
    rows = []
    for study in studies(place):
        versions = Versions(place, study)
        state = versions.state()
        for each in versions.installed:
            roles = {state.active: "answers", state.shadow: "shadow"}
            before = "answered before" if each in state.before else "–"
            rows.append((study, each, roles.get(each, before)))
    value = [{"study": study, "version": each, "role": role} for study, each, role in rows]
    console.show(as_json, value, "models", ["study", "version", "role"], lambda: rows)


@app.command()
def activate(
    study: StudyArgument,
    version: Annotated[str, typer.Argument(help="as consilium-predict models lists it")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Let a version answer. A service that runs takes it up within some seconds."""
    from consilium_serve.home import Home
    from consilium_serve.versions import Versions

    state = Versions(Home(home.resolve()), study).activate(version)
    say(f"{study}: {state.active} answers" + (f"; before: {state.before[-1]}" if state.before else ""))


@app.command()
def rollback(study: StudyArgument, home: HomeOption = DEFAULT_HOME) -> None:
    """Let the version answer that did before."""
    from consilium_serve.home import Home
    from consilium_serve.versions import Versions

    say(f"{study}: {Versions(Home(home.resolve()), study).rollback().active} answers")


@app.command()
def shadow(
    study: StudyArgument,
    version: Annotated[str, typer.Argument(help="a version, or none")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Let a version answer for the record alone, beside the one that is shown; none ends that."""
    from consilium_serve.home import Home
    from consilium_serve.versions import Versions

    found = Versions(Home(home.resolve()), study).let_shadow(None if version == "none" else version)
    say(f"{study}: shadow {found.shadow or 'none'}")


@app.command()
def token(
    client: Annotated[str, typer.Argument(help="name of the client, for the record")],
    home: HomeOption = DEFAULT_HOME,
    revoke: Annotated[bool, typer.Option("--revoke", help="Forget this client's token.")] = False,
) -> None:
    """Make a client's token and show it once; a new one replaces an older one."""
    from consilium_serve.home import Home

    place = Home(home.resolve())
    place.settings()
    if not 1 <= len(client) <= 64 or not client.isprintable():
        raise ConfigurationError("a client's name has 1 to 64 printable characters")
    if revoke:
        place.revoke(client)
        say(f"{client}'s token is no longer taken")
        return
    print(place.new_token(client))


@app.command()
def serve(home: HomeOption = DEFAULT_HOME) -> None:
    """Answer until Ctrl-C."""
    from consilium_serve.home import Home
    from consilium_serve.server import serve_forever

    serve_forever(Home(home.resolve()), say)


@app.command()
def record(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Verify the record of predictions and count what is in it."""
    from consilium_serve.home import Home
    from consilium_serve.record import entries

    place = Home(home.resolve())
    place.settings()
    found: dict[tuple[str, str], list[int]] = {}
    total = 0
    for entry in entries(place.records, place.identity().public):
        total += 1
        if entry["kind"] in ("predictions", "shadow"):
            body = entry["body"]
            counts = found.setdefault((f"{body['study']} {body['model'][:12]}", entry["kind"]), [0, 0])
            counts[0] += len(body["predictions"])
            counts[1] += sum(each["abstained"] for each in body["predictions"])
    value = [
        {"model": model, "kind": kind, "predictions": n, "abstained": abstained}
        for (model, kind), (n, abstained) in sorted(found.items())
    ]
    console.show(
        as_json,
        {"entries": total, "models": value},
        f"{total} entries, all verified",
        ["model", "kind", "predictions", "abstained"],
        lambda: [tuple(row.values()) for row in value],
    )


def main() -> None:
    """Entry point."""
    console.run(app, "consilium-predict")


if __name__ == "__main__":
    main()
