import typer

attributes_app = typer.Typer()
