#!/usr/bin/env bash
# Build elastic_moe/metrics/report/assets/echarts.min.js: the parts of Apache ECharts that the report needs, in one file.
# It needs npm. The file and its licences are part of the repository, so only a change of version or of parts needs this.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

version=6.1.0
esbuild=0.28.2
assets="$ROOT/elastic_moe/metrics/report/assets"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >entry.js <<'END'
import * as echarts from "echarts/core";
import { BarChart, CustomChart, LineChart } from "echarts/charts";
import {
  AriaComponent, DataZoomComponent, GridComponent, MarkAreaComponent, MarkLineComponent, TooltipComponent,
} from "echarts/components";
import { CanvasRenderer } from "echarts/renderers";
echarts.use([
  BarChart, CustomChart, LineChart, AriaComponent, DataZoomComponent, GridComponent, MarkAreaComponent,
  MarkLineComponent, TooltipComponent, CanvasRenderer,
]);
export const { init, graphic, connect, version } = echarts;
END
npm init -y >/dev/null
npm install --silent --no-audit --no-fund "echarts@$version" "esbuild@$esbuild"
npx esbuild entry.js --bundle --minify --format=iife --global-name=echarts --target=es2020 --legal-comments=none \
    --log-level=warning --outfile=echarts.js
{
    echo "/*! A part of Apache ECharts $version, built by scripts/echarts.sh. Apache-2.0: LICENSE.echarts, NOTICE.echarts */"
    cat echarts.js
} >"$assets/echarts.min.js"
cp node_modules/echarts/NOTICE "$assets/NOTICE.echarts"
cp node_modules/echarts/LICENSE "$assets/LICENSE.echarts"
for part in zrender/LICENSE tslib/LICENSE.txt; do
    printf '\n%s\n%s, which Apache ECharts contains:\n\n' "$(printf '=%.0s' {1..80})" "${part%/*}"
    cat "node_modules/$part"
done >>"$assets/LICENSE.echarts"
say "$(stat -c %s "$assets/echarts.min.js") bytes"
