import typer
from honed.cli import run
app = typer.Typer()
run.register(app)
if __name__ == "__main__":
    app()
