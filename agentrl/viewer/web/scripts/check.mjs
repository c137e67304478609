// Two builds give the same bytes, and these are the bytes that are committed.
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'

const web = new URL('..', import.meta.url).pathname
const out = join(web, '../static')
const hashes = () => {
  const found = {}
  const walk = (folder) => {
    for (const name of readdirSync(folder).sort()) {
      const path = join(folder, name)
      if (statSync(path).isDirectory()) walk(path)
      else found[path.slice(out.length + 1)] = createHash('sha256').update(readFileSync(path)).digest('hex')
    }
  }
  walk(out)
  return found
}
const committed = hashes()
const builds = [1, 2].map(() => {
  execFileSync('npm', ['run', 'build'], { cwd: web, stdio: ['ignore', 'ignore', 'inherit'] })
  return hashes()
})
const differs = (a, b) => [...new Set([...Object.keys(a), ...Object.keys(b)])].filter((name) => a[name] !== b[name])
const unlike = differs(builds[0], builds[1])
const stale = differs(committed, builds[0])
if (unlike.length) console.error(`two builds differ in: ${unlike.join(', ')}`)
if (stale.length) console.error(`static/ is not what the source builds; run npm run build and commit: ${stale.join(', ')}`)
if (unlike.length || stale.length) process.exit(1)
console.log(`${Object.keys(committed).length} files, the same bytes twice and as committed`)
