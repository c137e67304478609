// After a build: the fonts' licences go along, and the whole must stay under its budget.
import { copyFileSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'

const out = new URL('../../static/', import.meta.url).pathname
for (const name of ['inter', 'mono']) copyFileSync(new URL(`../src/fonts/${name}.LICENSE`, import.meta.url), join(out, 'assets', `${name}.LICENSE.txt`))
export const BUDGET = 200 * 1024
let total = 0
const walk = (folder) => {
  for (const name of readdirSync(folder).sort()) {
    const path = join(folder, name)
    if (statSync(path).isDirectory()) walk(path)
    else {
      const size = gzipSync(readFileSync(path), { level: 9 }).length
      if (!name.endsWith('LICENSE.txt')) total += size
      console.log(`${String(size).padStart(7)} ${path.slice(out.length)}`)
    }
  }
}
walk(out)
console.log(`${String(total).padStart(7)} gzipped, without licences; the budget is ${BUDGET}`)
if (total > BUDGET) process.exit(1)
