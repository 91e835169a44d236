#!/bin/sh
# slides/HW*.md -> slides/build/HW*.html, and HW*.pdf where a Chromium is found. Called by `make slides`.
set -eu
cd "$(dirname "$0")"

if ! node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null || ! command -v npm >/dev/null; then
    echo "Slides need Node.js 18 or newer (with npm) on the PATH: https://nodejs.org" >&2
    exit 1
fi
if ! cmp -s package-lock.json node_modules/.built-from; then # first time, or another version than before
    npm ci --no-audit --no-fund --loglevel=error
    cp package-lock.json node_modules/.built-from
fi

rm -rf build && mkdir build
cp -R HW*.md figures build/ # marp writes beside its sources, and links to figures stay as they are
grep -ho 'figures/[^) ]*' HW*.md | sort -u | while read -r figure; do
    test -f "$figure" || echo "not there yet: slides/$figure (its notebook writes it)"
done

marp="node_modules/.bin/marp --config marp.config.mjs"
$marp build/HW*.md </dev/null
for browser in "${CHROME_PATH:-}" chromium chromium-browser google-chrome google-chrome-stable \
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" ""; do
    command -v "$browser" >/dev/null 2>&1 && break
done
if [ -n "$browser" ]; then # run as root or in a container, marp itself switches Chromium's sandbox off
    CHROME_PATH=$(command -v "$browser") $marp --pdf --parallel 2 build/HW*.md </dev/null
else
    echo "No Chromium or Chrome found (on the PATH or as CHROME_PATH): HTML only, no PDF."
fi
rm build/HW*.md
echo "built:" && ls -1 build/HW* | sed 's|^|  slides/|'
