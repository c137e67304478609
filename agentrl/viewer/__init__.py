"""The viewer: a local web server over run folders. It reads through the store only, and changes nothing.

`app` has the routes (docs: /api/openapi.json), `security` what no request may do, `pages` the shapes of
what is shown, `runs` the folders, `live` what a run does now, `explain` where an advantage came from.
"""
