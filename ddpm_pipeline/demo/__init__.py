"""DEMO: a web page for a model. jobs.py computes, figures.py makes HTML of it, page.py puts it on a page of gradio."""
